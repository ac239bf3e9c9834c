"""Every exception that epsball raises on purpose, in one tree.

Each message is one line: it names the field, the value and the fix. The command line turns `BadInput` into exit code 2
and never shows a traceback for it.
"""

from __future__ import annotations


class EpsballError(Exception):
    """Root of the tree; catch this to catch all of them."""


class BadInput(EpsballError):
    """Something the caller gave cannot be used: data, labels, weights, a threat string, an option."""


class Refused(BadInput):
    """The preflight refuses to audit: a headline number would be meaningless. The message says how to mend it."""


class Untrusted(BadInput):
    """A file would run code when loaded (pickle); pass the named trust flag only if you wrote it yourself."""


class AccessDenied(EpsballError):
    """An attack asked a victim for more than its access allows (gradients of a label-only model, say)."""
