"""The one exception that means "the user gave us something we cannot use"."""


class InputError(ValueError):
    """Bad input: a file, key or value of the user's.

    The message says what was given, what is allowed and what to do, on one line. The command line prints it
    and exits with code 2; any other exception is a defect of ours and keeps its traceback.
    """
