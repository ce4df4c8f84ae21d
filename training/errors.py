"""What is raised for data that cannot be used, and errors of libraries in one line."""


class DataError(ValueError):
    """A data set that cannot be used; the message is one line that says what to do."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
