"""What is raised for data that cannot be used."""


class DataError(ValueError):
    """A data set that cannot be used; the message is one line that says what to do."""
