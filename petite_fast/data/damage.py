"""Libraries that read headers raise whatever damage leads them to; the user gets one sentence."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from petite_fast.errors import InputError


@contextmanager
def damaged_is_input_error(where: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Turn every exception of nibabel's or pydicom's parsing into an `InputError`.

    What they say themselves is not passed on, neither raised, warned nor logged: it quotes header
    values, and those may be a patient's name.

    Raises:
        InputError: the block raised something; names `where`, the kind of error and `expected`.
    """
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        fault = "cannot be read" if isinstance(error, OSError) else "is damaged"
        raise InputError(
            f"{where}: the file {fault} ({type(error).__name__}); expected {expected}"
        ) from None
    finally:
        logger.disabled = before
