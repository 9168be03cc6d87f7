"""Memory that was freed and that the C library keeps."""

import ctypes


def trim() -> None:
    """Give what is free in glibc's heaps back to the system; with another C library, do nothing.

    Where arrays of megabytes come and go between small ones that stay, its heaps grow by megabytes an image.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    malloc_trim(0)
