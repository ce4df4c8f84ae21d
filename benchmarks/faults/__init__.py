"""What goes wrong, done to real runs on purpose; each part of the table is a module here."""
