"""Dataflow regions: cycles of the C++ as it runs, of its recording, and of a walk cycle by cycle, are the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.hw.dataflow import ACCESS, PASS, DeadlockError, Fifo, Program, Recording, Stuck, evaluate, programs
from m3vit.hw.sim.dataflow import Kernel, build
from m3vit.hw.sim.instrument import Loop, instrumented

FRAMES = 3
N = 24


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    source = "dataflow_kernels.cpp"
    return build(Path(__file__).parent, [source], [source], tmp_path_factory.mktemp("dataflow"))


@pytest.fixture
def run(kernel: Kernel, tmp_path: Path):
    return lambda name, **assumed: kernel.run(tmp_path, tmp_path / "recording.bin", [name], **assumed)


def walk(work: list[Program], fifos: list[Fifo], frames: int) -> tuple[list[list[int]], list[list[int]]] | None:
    """The obvious way: in each cycle each process does what is due, if all of it can be done; None if nobody can.

    A process that begins anew while it drains is two that share its FIFOs.
    """
    wrote: list[list[int]] = [[] for _ in fifos]
    taken: list[list[int]] = [[] for _ in fifos]
    running = [[0, 0, number] for number, program in enumerate(work) if program.local]  # local cycle, frame, program
    cycle = 0
    while running:
        held = [(len(one), len(other)) for one, other in zip(wrote, taken, strict=True)]
        moved = False
        begun = []
        for state in sorted(running, key=lambda state: state[1]):
            local, frame, number = state
            program = work[number]
            due = [place for place, at in enumerate(program.local) if at == local]
            can = True
            for place in due:
                fifo, write = program.fifo[place], program.write[place]
                begun_of = sum(program.fifo[p] == fifo and program.write[p] == write for p in range(place))
                each = sum(f == fifo and w == write for f, w in zip(program.fifo, program.write, strict=True))
                word = frame * each + begun_of
                if write:
                    can &= not fifos[fifo].depth or word - fifos[fifo].depth < held[fifo][1]
                else:
                    can &= fifos[fifo].writer < 0 or word < held[fifo][0]
            if can:
                for place in due:
                    (wrote if program.write[place] else taken)[program.fifo[place]].append(cycle)
                state[0] += 1
                moved = True
                if state[0] == program.again and frame + 1 < frames:
                    begun.append([0, frame + 1, number])
        running = [
            state for state in running if state[0] <= max(work[state[2]].local[-1], work[state[2]].again)
        ] + begun
        cycle += 1
        if not moved:
            return None
    return wrote, taken


@pytest.mark.parametrize("name", ["chain", "diamond", "nested"])
def test_three_ways_to_the_same_cycles(run, name: str) -> None:
    recording = run(name)
    timing = evaluate(recording, FRAMES)
    np.testing.assert_array_equal(timing.wrote[1], recording.cycles["out"])
    assert [recording.stalls[fifo.name] for fifo in timing.fifos] == timing.stalls
    found = walk(programs(recording), recording.fifos, FRAMES)
    assert found is not None
    for place in range(len(recording.fifos)):
        assert timing.wrote[place].tolist() == found[0][place], recording.fifos[place]
        assert timing.taken[place].tolist() == found[1][place], recording.fifos[place]


def test_a_chain_by_hand(run) -> None:
    """The slow loop decides: a word each three cycles; every word is kept before the first one leaves."""
    recording = run("chain")
    first = 2 + 1 + (N - 1) * 3  # read in the second stage of the second process, then II apart; all words
    slow = recording.fifos[[fifo.name for fifo in recording.fifos].index("slow")]
    timing = evaluate(recording, FRAMES)
    assert slow.depth == 4 and len(timing.wrote[3]) == FRAMES * N
    assert timing.wrote[3][N - 1] - timing.wrote[3][0] == (N - 1) * 3 and timing.wrote[3][N - 1] > first
    # A frame of a process of one loop follows as the next iteration but one; of two, when they have drained.
    assert timing.of_outputs().interval == max(3 * N + 1, 2 * (N - 1 + 3 + 1), N + 1) or timing.stalls[3][1]


@pytest.mark.parametrize(
    "assumed", [{"loops": {0: (2, 5), 4: (1, 9)}}, {"fifos": 3}, {"depth": 30, "fifos": 40}, {"loops": {3: (4, 1)}}]
)
def test_a_recording_is_evaluated_as_the_cpp_would_run(run, assumed: dict) -> None:
    before, after = run("chain"), run("chain", **assumed)
    depths = {fifo.name: assumed["fifos"] for fifo in before.fifos} if "fifos" in assumed else {}
    # Only twice() has a product, so only its pipeline has the depth of those.
    loops = assumed.get("loops", {}) | ({0: (1, assumed["depth"])} if "depth" in assumed else {})
    timing = evaluate(before, FRAMES, depths, loops)
    np.testing.assert_array_equal(timing.wrote[1], after.cycles["out"])


def test_a_fifo_that_is_too_shallow_is_named(run) -> None:
    recording = run("diamond")
    needed = next(depth for depth in range(1, N + 9) if _goes(recording, {"other": depth}))
    assert needed > N / 2
    for found in (
        lambda: run("diamond", fifos=needed - 1),
        lambda: evaluate(recording, FRAMES, {fifo.name: needed - 1 for fifo in recording.fifos}),
    ):
        with pytest.raises(DeadlockError) as caught:
            found()
        assert Stuck("both", "writes", "other", needed - 1, "sums") in [
            one._replace(waits_for="sums") for one in caught.value.stuck
        ]
        assert f"other, full at depth {needed - 1}" in str(caught.value)
    assert walk(programs(recording), [_deep(fifo, needed - 1) for fifo in recording.fifos], FRAMES) is None


def _deep(fifo: Fifo, depth: int) -> Fifo:
    return replace(fifo, depth=depth) if fifo.name == "other" else fifo


def _goes(recording: Recording, depths: dict[str, int]) -> bool:
    try:
        evaluate(recording, FRAMES, depths)
    except DeadlockError:
        return False
    return True


def test_what_a_full_fifo_drops_depends_on_cycles(run) -> None:
    """Every fourth word finds room once the FIFO is full; the C++ says so itself, by its outputs."""
    recording = run("dropping")
    words = len(recording.cycles["out"])
    assert recording.timed and N / 4 < words < N / 4 + 6
    assert len(run("dropping", fifos=N).cycles["out"]) == N + 1
    with pytest.raises(InputError, match="run it again"):
        evaluate(recording)


def random_recording(rng: np.random.Generator) -> Recording:
    """A network of processes in a row, each reading from those before it at random, with one or two loops each."""
    many = int(rng.integers(2, 6))
    fifos = [Fifo("in", 0, -1, 0)]
    links: list[list[int]] = [[0]] + [[] for _ in range(many - 1)]
    outs: list[list[int]] = [[] for _ in range(many)]
    for reader in range(1, many):
        for writer in {reader - 1, int(rng.integers(0, reader))}:
            links[reader].append(len(fifos))
            outs[writer].append(len(fifos))
            fifos.append(Fifo(f"f{len(fifos)}", int(rng.integers(1, 12)), writer, reader))
    outs[-1].append(len(fifos))
    fifos.append(Fifo("out", 0, many - 1, -1))
    passes, accesses, loops = [], [], {}
    for process in range(many):
        split = process % 2 == 1 and rng.random() < 0.5
        for part in ([links[process]], [outs[process]]) if split else ([links[process], outs[process]],):
            loop = len(loops)
            loops[loop] = (int(rng.integers(1, 4)), int(rng.integers(1, 8)), 0)
            loops[loop] = (*loops[loop][:2], min(1, loops[loop][1] - 1))
            own = [(2 * fifo + (side is outs[process])) for side in part for fifo in side]
            accesses += [(len(passes), fifo, 0, word) for word in range(9) for fifo in own]
            passes.append((process, loop, 9, loops[loop][0]))
    names = [f"p{process}" for process in range(many)]
    tables = np.array(passes, PASS), np.array(accesses, ACCESS)
    return Recording(fifos, names, loops, *tables, 1, False, 0, {}, {})


def test_random_networks_cycle_by_cycle() -> None:
    rng, stuck = np.random.default_rng(0), 0
    for _ in range(60):
        recording = random_recording(rng)
        found = walk(programs(recording), recording.fifos, 2)
        if found is None:
            stuck += 1
            with pytest.raises(DeadlockError):
                evaluate(recording, 2)
            continue
        timing = evaluate(recording, 2)
        assert [one.tolist() for one in timing.wrote] == found[0]
        assert [one.tolist() for one in timing.taken] == found[1]
    assert 5 < stuck < 55


def test_pragmas_become_objects() -> None:
    source = """
// #pragma HLS dataflow
#define LOOP for (;;) {
void f(hls::stream<int> &a) {
    #pragma HLS PIPELINE II=WIDTH / 2
    for (int i = 0; i < 4; i++) a.read();
}
void g() {
    for (int i = 0; i < 4; i++) { std::string text = "} // {"; }
    Twice: for (int i = 0; i < 4; i++) {
        #pragma HLS pipeline off
        h(i);
    }
}
constexpr int h(int i) { for (;;) { return i; } }
void top() {
    #pragma HLS Dataflow
    hls::stream<pair<int, 2> > x("x"), y[2];
    #pragma HLS stream depth=16 variable=x
    const int n = f(3);
#ifndef __SYNTHESIS__
    check(x);
#endif
    a.b <int> (x);
    if (n > 2) { this->c(x); } else { this->d(x); }
}
"""
    loops: list[Loop] = []
    text = instrumented(source, "f.cpp", loops)
    assert [(loop.line, loop.function, loop.automatic) for loop in loops] == [(4, "f", False), (9, "g", True)]
    assert "rules{0, WIDTH / 2, 3, 0, false, false}" in text and "rules{1, 1, 3, 0, true, true}" in text
    assert text.count("iteration m3vit_iteration") == 2
    assert "m3vit_timed::set_depth(x, 16);" in text
    assert 'm3vit_timed::name(x, "x"); m3vit_timed::name(y, "y");' in text
    assert 'process("a.b", [&] { a.b <int> (x); });' in text
    assert 'process("c", [&] { if (n > 2) { this->c(x); } else { this->d(x); } });' in text
    assert text.count(".process(") == 2 and text.count(".join();") == 1
    with pytest.raises(InputError, match="brace"):
        instrumented("void f() {", "f.cpp", [])
