"""Lets mkdocstrings read the docstrings: their roles and double backticks become code in Markdown."""

import re

import griffe

# The names of several arguments that are described together may take two lines; griffe reads them on one.
NAMES = re.compile(r"^( *(?:\w+, )*\w+,)\n +", re.MULTILINE)
LITERAL = re.compile(r"::$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites each docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Replaces roles by the last part of the name that they refer to."""
        if obj.docstring:
            text = ROLE.sub(lambda role: f"`{role[1].rsplit('.', 1)[-1]}`", obj.docstring.value)
            text = LITERAL.sub(":", text)
            obj.docstring.value = NAMES.sub(r"\1 ", text.replace("``", "`"))
