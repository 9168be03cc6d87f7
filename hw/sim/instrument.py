"""HLS C++ that says when it does what: its pragmas made objects of m3vit/hw/include/dataflow/hls_stream.h. No torch.

By what stands in the source, whoever wrote it: a loop with `#pragma HLS pipeline`, or a loop with none inside it that
says nothing (Vitis HLS pipelines it), gets an object that begins an iteration; so does a function with the pragma. In a
region with `#pragma HLS dataflow` each statement that is a call becomes a process. FIFOs get the depth of
`#pragma HLS stream`. The text is read by its braces and statements; it is no compiler.
"""

import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from m3vit.errors import InputError

PRAGMA = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+HLS[ \t]+(\w+)([^\n]*)", re.IGNORECASE | re.MULTILINE)
LOOP = re.compile(r"\b(for|while)\s*\(")
SETTING = re.compile(r"(\w+)\s*=\s*(\S.*?)(?=\s+\w+\s*=|\s+(?:off|rewind|enable_flush)\b|\s*$)", re.IGNORECASE)
LABEL = re.compile(r"(\w+)\s*:\s*$")
STREAMS = re.compile(r"^(?:hls\s*::\s*)?stream\s*<")
# What may be called by a loop that only moves values: streams, conversions, choices.
MOVING = re.compile(r"read|write|read_nb|write_nb|empty|full|if|for|while|sizeof|min|max|to_raw|from_raw|cast|\w+_[tT]")
MOVES = 3  # stages of a pipeline that only moves values


@dataclass(frozen=True)
class Loop:
    """A pipelined loop: its file, line, label (or what stands there), function.

    automatic: no pragma asks for its pipeline. moves: it has no products, so its pipeline is taken to be short.
    """

    file: str
    line: int
    label: str
    function: str
    automatic: bool
    moves: bool

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.label}"


@dataclass
class _Block:
    """Braces of a source: from `start` ("{") to `end` ("}"). loop: the place of its keyword, if it is a loop's body."""

    start: int
    end: int = -1
    loop: int | None = None
    inner: list["_Block"] = field(default_factory=list)
    pragmas: list[tuple[str, dict[str, str], int, int]] = field(default_factory=list)

    def all_loops(self) -> Iterator["_Block"]:
        for one in self.inner:
            if one.loop is not None:
                yield one
            yield from one.all_loops()

    def has(self, kind: str) -> dict[str, str] | None:
        return next((settings for name, settings, *_ in self.pragmas if name == kind), None)


@dataclass
class _Source:
    file: str
    bare: str
    root: _Block
    lines: list[int]
    loops: list[Loop]
    edits: list[tuple[int, int, str]]
    simulated: list[tuple[int, int]]  # what only C-simulation has


def instrumented(text: str, file: str, loops: list[Loop], as_hardware: bool = False) -> str:
    """Return the source with objects in the place of its pragmas, and append its pipelined loops to `loops`.

    as_hardware: take what stands under __SYNTHESIS__. Raises InputError for braces that do not match.
    """
    if as_hardware:
        text = re.sub(r"\b__SYNTHESIS__\b", "M3VIT_SYNTHESISED", text)
    bare = _without_comments(text)
    edits: list[tuple[int, int, str]] = []
    bare, text = _with_braces(bare, text)
    root = _blocks(bare, file)
    lines = [match.start() for match in re.finditer("\n", text)]
    for match in PRAGMA.finditer(bare):
        kind, settings = match[1].lower(), {key.lower(): value for key, value in SETTING.findall(match[2])}
        if re.search(r"\boff\b", match[2], re.IGNORECASE):
            settings["off"] = ""
        place = _innermost(root, match.start())
        if kind in ("pipeline", "dataflow", "unroll"):
            while place.loop is None and not _is_function(bare, place) and (outer := _outer(root, place)):
                place = outer
        place.pragmas.append((kind, settings, match.start(), match.end()))
        if kind == "stream" and {"variable", "depth"} <= settings.keys():
            code = f"m3vit_timed::set_depth({settings['variable']}, {settings['depth']});"
            edits.append((match.start(), match.end(), code))
    _pipelines(root, False, _Source(file, bare, root, lines, loops, edits, _simulated(bare)))
    for block in _all(root):
        if block.has("dataflow") is not None:
            edits += _region(block, bare, text)
    for start, end, code in sorted(edits, reverse=True):
        text = text[:start] + code + text[end:]
    return text


def _without_comments(text: str) -> str:
    """Return the text with blanks in the place of comments, strings, and macros' definitions: places stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#[ \t]*define\b(?:\\\n|[^\n])*'
    return re.sub(pattern, blank, text, flags=re.DOTALL | re.MULTILINE)


def _matching(bare: str, start: int) -> int:
    """Return the place of the bracket that closes the one at `start`, or -1."""
    pairs, depth = {"(": ")", "[": "]", "{": "}"}, 0
    opening, closing = bare[start], pairs[bare[start]]
    for place in range(start, len(bare)):
        if bare[place] == opening:
            depth += 1
        elif bare[place] == closing:
            depth -= 1
            if not depth:
                return place
    return -1


def _after_blanks(bare: str, place: int) -> int:
    return place + len(bare[place:]) - len(bare[place:].lstrip())


def _statement_end(bare: str, start: int) -> int:
    """Return the place after the statement that begins at `start`."""
    if bare[start] == "{":
        return _matching(bare, start) + 1
    if control := re.compile(r"(if|for|while|switch)\b\s*\(").match(bare, start):
        end = _statement_end(bare, _after_blanks(bare, _matching(bare, control.end() - 1) + 1))
        other = _after_blanks(bare, end)
        if control[1] == "if" and re.compile(r"else\b").match(bare, other):
            return _statement_end(bare, _after_blanks(bare, other + len("else")))
        return end
    place = start
    while place < len(bare) and bare[place] != ";":
        place = _matching(bare, place) + 1 if bare[place] in "([{" else place + 1
    return place + 1


def _with_braces(bare: str, text: str) -> tuple[str, str]:
    """Return both with braces around the bodies of loops that are single statements."""
    for match in reversed(list(LOOP.finditer(bare))):
        close = _matching(bare, match.end() - 1)
        body = _after_blanks(bare, close + 1)
        if close < 0 or body >= len(bare) or bare[body] in "{;#":
            continue
        end = _statement_end(bare, body)
        bare = bare[:body] + "{" + bare[body:end] + "}" + bare[end:]
        text = text[:body] + "{" + text[body:end] + "}" + text[end:]
    return bare, text


def _blocks(bare: str, file: str) -> _Block:
    root = _Block(-1, len(bare))
    bodies = {}
    for match in LOOP.finditer(bare):
        close = _matching(bare, match.end() - 1)
        rest = bare[close + 1 :].lstrip()
        if close >= 0 and rest.startswith("{"):
            bodies[bare.index("{", close)] = match.start()
    stack = [root]
    for match in re.finditer(r"[{}]", bare):
        if match[0] == "{":
            block = _Block(match.start(), loop=bodies.get(match.start()))
            stack[-1].inner.append(block)
            stack.append(block)
        elif len(stack) > 1:
            stack.pop().end = match.start()
        else:
            raise InputError(f"{file}: a brace closes that none has opened")
    if len(stack) > 1:
        raise InputError(f"{file}: a brace is not closed")
    return root


def _all(block: _Block) -> Iterator[_Block]:
    for one in block.inner:
        yield one
        yield from _all(one)


def _innermost(block: _Block, place: int) -> _Block:
    for one in block.inner:
        if one.start < place < one.end:
            return _innermost(one, place)
    return block


def _outer(root: _Block, block: _Block) -> _Block | None:
    return next((one for one in [root, *_all(root)] if block in one.inner), None)


def _head(bare: str, block: _Block) -> str:
    """Return what stands before a block, from the end of what came before."""
    return re.split(r"[;{}]|^[ \t]*#[^\n]*", bare[: block.start], flags=re.MULTILINE)[-1]


def _is_function(bare: str, block: _Block) -> bool:
    head = _head(bare, block).strip()
    return "(" in head and not re.match(r"(if|else|switch|do|for|while)\b", head)


def _pipelines(block: _Block, inside: bool, source: "_Source") -> None:
    """Add what begins an iteration to loops and functions that are pipelined. inside: of a pipeline, or constexpr."""
    bare, loops, edits = source.bare, source.loops, source.edits
    for one in block.inner:
        if any(begin <= one.start < end for begin, end in source.simulated):
            continue
        head = " ".join(_head(bare, one).split())
        constant = "constexpr" in head
        pragma = one.has("pipeline")
        wanted = pragma is not None and "off" not in pragma
        automatic = False
        if (
            one.loop is not None
            and not inside
            and all(one.has(kind) is None for kind in ("pipeline", "unroll", "dataflow"))
        ):
            automatic = all(loop.has("unroll") is not None for loop in one.all_loops())
        if (wanted or automatic) and not constant:
            place = one.start if one.loop is None else one.loop
            label = LABEL.search(bare[max(0, place - 80) : place]) if one.loop is not None else None
            body = bare[one.start : one.end]
            said = label[1] if label else " ".join((head if one.loop is None else bare[place : one.start]).split())[:40]
            condition = "".join(bare[place : one.start].split())
            counted = one.loop is not None and not re.fullmatch(r"while\((true|1)\)|for\([^;]*;;[^;]*\)", condition)
            moves = not _computes(body)
            waits = len(re.findall(r"\bap_wait\s*\(", body))
            numbers = (
                (pragma or {}).get("ii", "1"),
                MOVES if moves else 0,
                waits,
                _bool(counted),
                _bool(automatic),
            )
            rules = f"m3vit_timed::rules{{{len(loops)}, {', '.join(map(str, numbers))}}}"
            line, function = bisect(source.lines, place) + 1, _function(source, one)
            loops.append(Loop(source.file, line, said, function, automatic, moves))
            added = f" m3vit_timed::iteration m3vit_iteration({rules});"
            edits.append((one.start + 1, one.start + 1, added))
            inner, outer = one, _outer(source.root, one)
            while outer and outer.loop is not None and _rolled(outer) == [inner] and outer.has("pipeline") is None:
                edits.append((outer.start + 1, outer.start + 1, f" m3vit_timed::nest m3vit_nest({rules});"))
                inner, outer = outer, _outer(source.root, outer)
        _pipelines(one, inside or wanted or constant, source)


def _computes(body: str) -> bool:
    """Return whether a loop's body has products or quotients, of indices apart, or calls something."""
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", body)) != body:
        body = shorter
    loops = r"\b(for|if|while)\s*\([^{};]*?;[^{};]*;[^{}]*?\)|\b(if|while)\s*\([^{};]*\)|^\s*#[^\n]*"
    body = _without_arguments(re.sub(loops, "", body, flags=re.MULTILINE))
    body = re.sub(r"\b(?!return\b|else\b)\w+\s+\w+\s*\(", "(", body)  # what is declared is not called
    return re.search(r"[\w)]\s*[*/%]=?\s*[\w(]", body) is not None or any(
        not MOVING.fullmatch(name) for name in re.findall(r"(\w+)\s*\(", body)
    )


def _simulated(bare: str) -> list[tuple[int, int]]:
    """Return from where to where stands what #ifndef __SYNTHESIS__ leaves to C-simulation."""
    found, nested, begin = [], 0, -1
    for match in re.finditer(
        r"^[ \t]*#[ \t]*(ifndef[ \t]+__SYNTHESIS__|ifndef|ifdef|if|else|endif)\b", bare, re.MULTILINE
    ):
        if begin < 0:
            if match[1].endswith("__SYNTHESIS__"):
                begin, nested = match.end(), 0
        elif match[1].startswith("if"):
            nested += 1
        elif nested and match[1] == "endif":
            nested -= 1
        elif not nested:
            found.append((begin, match.start()))
            begin = -1
    return found


def _function(source: _Source, block: _Block | None) -> str:
    """Return the name of the function that a block is, or is in."""
    while block and not _is_function(source.bare, block):
        block = _outer(source.root, block)
    names = re.findall(r"(\w+)\s*\(", _head(source.bare, block)) if block else []
    return names[0] if names else ""


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _rolled(block: _Block) -> list[_Block]:
    """Return the loops directly in a block that are not unrolled."""
    found = []
    for one in block.inner:
        if one.loop is None:
            found += _rolled(one)
        elif one.has("unroll") is None:
            found.append(one)
    return found


def _statements(block: _Block, bare: str) -> Iterator[tuple[int, int]]:
    """Yield the statements of a block, `if` with its `else`, without what only C-simulation has."""
    place, simulated = block.start + 1, _simulated(bare)
    while (place := _after_blanks(bare, place)) < block.end:
        if bare[place] == "#":
            place = bare.find("\n", place)
            continue
        end = _statement_end(bare, place)
        if not any(begin <= place < last for begin, last in simulated):
            yield place, end
        place = end


def _without_arguments(text: str) -> str:
    """Return the text without what stands in angle brackets."""
    while (shorter := re.sub(r"<[^<>]*>", "", text)) != text:
        text = shorter
    return text


def _region(block: _Block, bare: str, text: str) -> list[tuple[int, int, str]]:
    """Return what makes processes of the calls in a dataflow region, and names its FIFOs."""
    edits = [
        (block.start + 1, block.start + 1, " m3vit_timed::region m3vit_region;"),
        (block.end, block.end, " m3vit_region.join(); "),
    ]
    names: dict[str, int] = {}
    for begin, end in _statements(block, bare):
        raw = bare[begin:end]
        begin += len(raw) - len(raw.lstrip())
        raw = raw.strip()
        short = re.sub(r"\s*(\.|->|::|\()\s*", r"\1", _without_arguments(raw))
        if STREAMS.match(raw):
            declared = re.sub(r"\([^()]*\)|\[[^\]]*\]", "", short).rstrip(";").replace("hls::", "")
            fifos = [name.strip() for name in declared.removeprefix("stream").split(",")]
            named = " ".join(f'm3vit_timed::name({name}, "{name}");' for name in fifos if name.isidentifier())
            edits.append((end, end, " " + named))
            continue
        call = re.match(r"((?:\w|\.|->|::|\[\w*\])+)\(", short)
        if short.startswith(("if(", "for(", "while(")):
            call = re.search(r"[{};]((?:\w|\.|->|::)+)\(", re.sub(r"\s+", "", short))
        if not call or call[1] in ("return", "assert", "printf", "static_assert"):
            continue
        label = call[1].removeprefix("this->").removeprefix("nnet::").removeprefix("vit::")
        names[label] = names.get(label, 0) + 1
        label += f".{names[label]}" if names[label] > 1 else ""
        edits.append((begin, begin, f'm3vit_region.process("{label}", [&] {{ '))
        edits.append((end, end, " });"))
    return edits
