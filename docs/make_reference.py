"""Write docs/reference.md from the docstrings of the public names.

Usage: python docs/make_reference.py
"""

import inspect
import re
from pathlib import Path
from typing import Any

import gradstat
import gradstat.plot

PAGE = Path(__file__).parent / "reference.md"
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Example):$", re.MULTILINE)
FENCE = "```"
HEAD = """# Reference

Made from the docstrings by `docs/make_reference.py`.
"""


def render() -> str:
    """The page."""
    parts = [HEAD]
    public = [name for name in gradstat.__all__ if name != "__version__"]
    for name in sorted(public, key=str.lower):
        parts += describe(f"gradstat.{name}", getattr(gradstat, name), "##")
    for name, function in vars(gradstat.plot).items():
        is_own = inspect.isfunction(function) and function.__module__ == "gradstat.plot"
        if is_own and not name.startswith("_"):
            parts += describe(f"gradstat.plot.{name}", function, "##")
    return "\n".join(parts)


def describe(name: str, thing: Any, level: str) -> list[str]:
    """Heading, signature and docstring of a name, and of what a class has."""
    parts = [f"{level} {name}\n"]
    if callable(thing):
        parts.append(f"```text\n{name.rpartition('.')[2]}{signature(thing)}\n```\n")
    parts.append(as_markdown(inspect.getdoc(thing) or ""))
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if not member.startswith("_") and inspect.isfunction(function):
                owner = name.rpartition(".")[2]
                shown = value if isinstance(value, property) else function
                parts += describe(f"{owner}.{member}", shown, "###")
    return parts


def signature(thing: Any) -> str:
    """Parameters, one to a line when they are many."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except ValueError:
        return "()"
    texts: list[str] = []
    starred = False
    for each in parameters:
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not starred:
            starred = True
            texts.append("*")
        # Annotations are text; str() would put them in quotes.
        default = "" if each.default is each.empty else f" = {each.default!r}"
        texts.append(f"{each.name}: {each.annotation}{default}")
    line = ", ".join(texts)
    return f"({line})" if len(line) <= 80 else "(\n    " + ",\n    ".join(texts) + ",\n)"


def as_markdown(doc: str) -> str:
    """A docstring in Google's style: sections as bold words, their entries as lists."""
    lines: list[str] = []
    section = ""
    for line in doc.splitlines():
        found = SECTION.match(line)
        if found:
            section = found[1]
            lines += [f"**{section}**", ""]
            if section == "Example":
                lines.append(f"{FENCE}pycon")
        elif section == "Example":
            lines.append(line[4:])
        elif section in ("Args", "Raises") and re.match(r"^    \S+: ", line):
            term, _, text = line.strip().partition(": ")
            lines.append(f"- `{term}`: {text}")
        elif section:
            lines.append(
                "  " + line.strip()
                if line.strip() and section not in ("Returns", "Yields")
                else line[4:]
            )
        else:
            lines.append(line)
    if section == "Example":
        lines.append(FENCE)
    text = "\n".join(lines).rstrip()
    return re.sub(r"(?<!`)``(?!`)", "`", text) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
