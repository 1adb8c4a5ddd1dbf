"""Everything lccost raises on purpose.

    LccostError
    ├── UnknownNameError     a name that is not in a registry; carries the near matches
    ├── ConfigError          a file, key or value that cannot be used: expected what, got what
    │   └── UnsupportedArchitectureError   a model_type or key nobody understood
    ├── NotApplicableError   a valid method, model and GPU that do not go together
    ├── MissingExtraError    an optional package or device that is not here
    └── MeasurementError     a measurement that could not be made, and why

Messages say what was expected, what was got, and what to do. The command line prints them without
a traceback.
"""

from collections.abc import Iterable


class LccostError(Exception):
    """Base of every error that a user can cause."""


class UnknownNameError(LccostError):
    """A name that is not known; the message lists the near matches.

    Parameters: ``kind`` is the word for what was looked up ("GPU"), ``name`` what the user wrote,
    ``known`` all names that exist, ``hint`` the command that lists them.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(set(known))
        name = name if len(name) <= 80 else f"{name[:77]}..."
        low = name.lower()
        # A name that is part of others ("h100") is a family: its members come first.
        near = [n for n in names if len(low) > 2 and low in n][:6]
        if len(near) < 3:
            import difflib  # only for the user's mistakes

            # of "owner/model" the model says more than who publishes it
            for wanted, cutoff in ((low.rpartition("/")[2], 0.7), (low, 0.45)):
                close = difflib.get_close_matches(wanted, names, n=3, cutoff=cutoff)
                near += [n for n in close if n not in near]
            near = near[:5]
        text = f"unknown {kind} {name!r}."
        if near:
            text += f" Did you mean: {', '.join(near)}?"
        elif len(names) <= 20:
            text += f" Known: {', '.join(names)}."
        if hint:
            text += f"  {hint}"
        super().__init__(text)
        self.near = tuple(near)


class ConfigError(LccostError):
    """A file, key or value that cannot be used."""


class UnsupportedArchitectureError(ConfigError):
    """A model_type, or an attention-related key, that lccost does not understand."""


class NotApplicableError(LccostError):
    """A combination that does not exist, with the reason."""


class MissingExtraError(LccostError):
    """An optional package or a device that is not here."""


class MeasurementError(LccostError):
    """A measurement that could not be made, and why."""
