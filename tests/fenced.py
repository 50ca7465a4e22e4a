"""Blocks of code in Markdown, and what it takes to run them as they are written."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import yaml

FENCE = re.compile(r"^( *)(```+)(\S*)(.*)\n((?:.*\n)*?)\1\2 *$", re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?:(?: {4}.*)?\n)*? {4}.*\n")


class Block(NamedTuple):
    """A block of code; one that is indented has no language."""

    line: int
    language: str
    title: str
    text: str

    @property
    def first(self) -> str:
        """Its first line, by which it is named, with single blanks."""
        return " ".join(self.text.partition("\n")[0].split())


def blocks_of(text: str) -> list[Block]:
    found = []

    def take(match: re.Match[str]) -> str:
        title = re.search(r'title="(.+?)"', match[4])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(line, match[3], title[1] if title else "", dedent(match[5])))
        return "\n" * match[0].count("\n")

    rest = FENCE.sub(take, text)
    for match in INDENTED.finditer(rest):
        line = rest.count("\n", 0, match.start()) + 1
        found.append(Block(line, "", "", dedent(match[0])))
    return sorted(found)


def commands_of(block: Block) -> list[list[str]]:
    """Words of every command."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_block(block: Block, names: dict[str, Any], command: Callable[..., Any]) -> None:
    """Run a block in the folder where one is; Python leaves its variables in `names`."""
    if block.title:
        if block.language == "python":
            compile(block.text, block.title, "exec")
        Path(block.title).write_text(block.text, encoding="utf-8")
    elif block.language == "bash":
        for words in commands_of(block):
            run_command(words, command)
    elif block.language == "python":
        exec(compile("\n" * block.line + block.text, "page", "exec"), names)
    elif block.language == "pycon":
        test = doctest.DocTestParser().get_doctest(block.text, names, "page", None, block.line)
        said: list[str] = []
        # the namespace of the test is a copy, and later blocks go on with it
        doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
        names.update(test.globs)
        assert not said, "".join(said)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)


def run_command(words: list[str], command: Callable[..., Any]) -> None:
    assert words[0] == "celltyper", f"only celltyper is run: {words}"
    if "--workers" in words:
        # a process takes seconds to start; what they do is tested in test_cohort.py
        i = words.index("--workers")
        words = words[:i] + words[i + 2 :]
    outcome = command(*words[1:])
    assert outcome.code == 0, f"{shlex.join(words)}: {outcome.err}"
