"""The benchmarks' own parts: formulas by hand, real processes, no long runs."""

from __future__ import annotations

import asyncio
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from rich.console import Console

from benchmarks.bandwidth import read_bandwidth
from benchmarks.comparison import (
    Comparison,
    advantage,
    kv_bytes_per_token,
    memory_bound,
    weight_bytes_per_token,
)
from benchmarks.divergence import Divergence
from benchmarks.peers import HEADWATER, PEERS, Peer, Work, find_program
from benchmarks.quality import TEXT, llama_cpp_logits, measure, report, windows
from benchmarks.running import Absent, Server, started
from benchmarks.workloads import (
    Client,
    Decode,
    Growth,
    Interference,
    Metric,
    Prefill,
    Workload,
    WorkloadError,
    common_rate,
    gaps_within,
    inter_token_ms,
    workloads,
)
from model.gguf.file import GGUFFile
from server.bench.report import RequestTiming
from tests.fixtures.tiny import make_tiny
from tests.fixtures.tiny_tokenizer import write_tokenizer
from tests.model.decoding import read_config
from tests.model.gguf_models import write_gguf

ROOT = Path(__file__).parents[1]


def timing(arrivals: list[float], tokens: int | None = None) -> RequestTiming:
    return RequestTiming(
        turn=0, started=0.0, ended=arrivals[-1], arrivals=arrivals, completion_tokens=tokens
    )


class TestDivergence:
    def test_by_hand(self) -> None:
        # Two rows over three tokens. The second row's best token differs from the reference's.
        reference = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]]).log()
        ours = torch.tensor([[0.25, 0.5, 0.25], [0.6, 0.3, 0.1]])
        found = Divergence()
        found.add(reference, ours.log() + 7.0, torch.tensor([1, 2]))  # logits: any shift
        assert found.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.1)) / 2))
        kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)  # of the first row; the second has none
        assert found.mean_kl == pytest.approx(kl / 2, rel=1e-5)
        assert found.agreement == 0.5

    def test_pieces_are_summed_by_rows(self) -> None:
        torch.manual_seed(0)
        logits, noise = torch.randn(7, 50), torch.randn(7, 50) / 10
        targets = torch.randint(50, (7,))
        whole, pieces = Divergence(), Divergence()
        reference = logits.log_softmax(-1)
        whole.add(reference, logits + noise, targets)
        for rows in (slice(0, 1), slice(1, 7)):
            pieces.add(reference[rows], (logits + noise)[rows], targets[rows])
        assert pieces.count == 7
        assert pieces.perplexity == pytest.approx(whole.perplexity)
        assert pieces.mean_kl == pytest.approx(whole.mean_kl)

    def test_the_reference_against_itself(self) -> None:
        reference = torch.randn(4, 9).log_softmax(-1)
        found = Divergence()
        found.add(reference, reference, torch.tensor([0, 1, 2, 3]))
        document = found.as_document(found)
        assert document["perplexity_ratio"] == 1 and document["top1_agreement"] == 1
        assert document["mean_kl"] == 0


class TestQuality:
    def test_windows_lose_nothing_but_a_lonely_token(self) -> None:
        assert windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]
        assert windows(list(range(8)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]

    def test_each_window_is_scored_on_what_follows(self) -> None:
        def sure_of_the_next(token_ids: list[int]) -> torch.Tensor:
            logits = torch.zeros(len(token_ids), 10)
            for row, token in enumerate(token_ids[1:]):
                logits[row, token] = 30.0
            return logits

        def sure_of_the_same(token_ids: list[int]) -> torch.Tensor:
            return 30.0 * torch.nn.functional.one_hot(torch.tensor(token_ids), 10)

        found, seconds = measure([[1, 2, 3], [4, 5]], sure_of_the_next, {"other": sure_of_the_same})
        assert [one.count for one in found.values()] == [3, 3]
        assert found["reference"].perplexity == pytest.approx(1.0, abs=1e-6)
        assert found["other"].agreement == 0
        assert found["other"].mean_kl == pytest.approx(30.0, rel=1e-3)
        assert set(seconds) == {"reference", "other"}

    def test_the_report(self, capsys: pytest.CaptureFixture[str]) -> None:
        found, _ = measure([[0, 1, 2]], lambda ids: torch.randn(len(ids), 5), {})
        document = report(found, "a title")
        assert json.loads(json.dumps(document)) == document
        assert "a title" in capsys.readouterr().out

    def test_a_llama_cpp_that_does_not_start(self, tmp_path: Path) -> None:
        # This interpreter has no llama_cpp.
        with pytest.raises(OSError, match="ended early, with code 1"):
            with llama_cpp_logits(sys.executable, tmp_path / "none.gguf", 1):
                pass

    def test_the_text_is_long_and_varied(self) -> None:
        text = TEXT.read_text()
        words = text.split()
        assert len(text) > 90_000
        assert len({" ".join(words[i : i + 8]) for i in range(len(words))}) > 0.9 * len(words)


METRICS = {
    "rate": Metric("a rate", "tokens/s", True),
    "time": Metric("a time", "ms", False),
}


class TestComparison:
    def comparison(self) -> Comparison:
        found = Comparison(METRICS)
        for rate in (90.0, 100.0, 300.0):
            found.add("headwater", {"rate": rate, "time": 5.0})
        found.add("peer", {"rate": 40.0, "time": 20.0})
        found.absent["other"] = "not given (--other PATH)"
        return found

    def test_better_is_above_one_either_way(self) -> None:
        assert advantage(200, 100, higher_is_better=True) == 2
        assert advantage(10, 20, higher_is_better=False) == 2

    def test_medians_and_ratios(self) -> None:
        found = self.comparison()
        assert found.median("rate", "headwater") == 100
        assert found.ratio("rate", "peer") == 2.5
        assert found.ratio("time", "peer") == 4
        assert found.median("rate", "other") is None and found.ratio("rate", "other") is None

    def test_the_document(self) -> None:
        document = json.loads(json.dumps(self.comparison().as_document()))
        assert document["results"]["rate"] == {
            "title": "a rate",
            "unit": "tokens/s",
            "higher_is_better": True,
            "servers": {
                "headwater": {"median": 100.0, "runs": [90.0, 100.0, 300.0]},
                "peer": {"median": 40.0, "runs": [40.0]},
            },
            "headwater_is_better_by": {"peer": 2.5},
        }
        assert document["absent"] == {"other": "not given (--other PATH)"}

    def test_the_table(self) -> None:
        out = io.StringIO()
        self.comparison().print_table(
            ["headwater", "peer"], "title", Console(file=out, width=100, color_system=None)
        )
        lines = out.getvalue().splitlines()
        assert any("a rate, tokens/s" in line and "40.0 (2.50x)" in line for line in lines)
        assert "other is absent: not given (--other PATH)" in lines

    def test_the_memory_bound(self) -> None:
        assert memory_bound(100, 50_000_000, 10e9) == 0.5

    @pytest.mark.parametrize("tied", [True, False])
    def test_bytes_of_a_step(self, tmp_path: Path, tied: bool) -> None:
        make_tiny("llama", tmp_path / "hf", tie_word_embeddings=tied)
        config = read_config(tmp_path / "hf")
        path = tmp_path / "model.gguf"
        write_gguf(
            tmp_path / "hf", config, path, lambda _, values: (values, GGMLQuantizationType.F32)
        )
        file = GGUFFile.open(path)
        assert ("output.weight" in file.tensors) is not tied
        total = sum(tensor.nbytes for tensor in file.tensors.values())
        unread = 0 if tied else file.tensors["token_embd.weight"].nbytes
        assert weight_bytes_per_token(file) == total - unread > 0
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
        assert kv_bytes_per_token(config) == kv


class TestTimes:
    def test_the_common_rate_is_that_of_the_overlap(self) -> None:
        early = timing([0.0, 1.0, 2.0, 3.0, 4.0])
        late = timing([2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0])
        # From 2 to 4: two tokens of the first, four of the second.
        assert common_rate([early, late]) == pytest.approx(3.0)

    def test_a_delta_of_several_tokens(self) -> None:
        assert common_rate([timing([0.0, 1.0, 2.0], tokens=6)]) == pytest.approx(2.0)

    def test_streams_that_hardly_overlap_have_no_rate(self) -> None:
        first, second = timing([0.0, 1.0, 2.0]), timing([1.9, 2.5, 3.0, 3.5])
        assert common_rate([first, second]) is None
        assert common_rate([timing([0.0, 1.0]), timing([2.0, 3.0])]) is None

    def test_gaps_that_reach_into_the_time(self) -> None:
        arrivals = [0.0, 1.0, 4.0, 4.5, 9.0, 9.5]
        assert gaps_within(arrivals, 2.0, 5.0) == [3.0, 0.5, 4.5]

    def test_inter_token(self) -> None:
        # Two deltas of two tokens each after the first one.
        assert inter_token_ms(timing([1.0, 1.01, 1.04], tokens=6)) == pytest.approx(10.0)
        with pytest.raises(WorkloadError, match="came all at once"):
            inter_token_ms(timing([1.0, 1.0]))


class TestPeers:
    work = Work(Path("model.gguf"), lambda: Path("folder"), 3)

    def test_not_given(self) -> None:
        for peer in PEERS:
            with pytest.raises(LookupError, match=f"not given \\({peer.option} PATH\\)"):
                find_program(peer, None)
        assert find_program(HEADWATER, None) == sys.executable

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(LookupError, match="there is no file"):
            find_program(PEERS[0], str(tmp_path / "none"))

    def test_a_venv_is_not_left_through_its_link(self, tmp_path: Path) -> None:
        link = tmp_path / "python"
        link.symlink_to(sys.executable)
        assert find_program(PEERS[0], str(link)) == str(link)

    @pytest.mark.parametrize("peer", [HEADWATER, *PEERS], ids=lambda peer: str(peer.name))
    def test_every_server_is_told_its_port(self, peer: Peer) -> None:
        command = peer.command(self.work, "program", 4711)
        assert command[0] == "program" and "4711" in command

    def test_one_that_ends_at_once_is_absent(self, tmp_path: Path) -> None:
        script = tmp_path / "server.py"
        script.write_text("raise SystemExit('no model, no server')")
        peer = Peer("odd", "--odd", lambda _work, program, _port: [program, str(script)])
        with pytest.raises(Absent, match="ended with code 1: no model, no server"):
            with started(peer, sys.executable, self.work):
                pass

    def test_one_that_cannot_be_run_is_absent(self, tmp_path: Path) -> None:
        peer = Peer("odd", "--odd", lambda _work, program, _port: [program])
        program = tmp_path / "not-executable"
        program.touch()
        with pytest.raises(Absent, match="cannot be run"):
            with started(peer, str(program), self.work):
                pass


@pytest.mark.e2e
def test_the_workloads_on_a_real_server(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    make_tiny("llama", folder, max_position_embeddings=4096)
    write_tokenizer(folder)
    work = Work(folder, lambda: folder, 1)
    plan: list[Workload] = [
        Decode(1, 12, rounds=1),
        Decode(4, 12, rounds=1),
        Prefill(200, rounds=1),
        Interference(2, 100, rounds=1, room=3000),
        Growth(1000, 200, rounds=1),  # the model is small: fewer may come in one read
    ]
    with started(HEADWATER, sys.executable, work) as server:
        assert server.memory_mib() > 50
        for seed, one in enumerate(plan):
            values = asyncio.run(_run(server, one, seed))
            # The overlap of short streams is up to chance; all else must be there.
            assert set(values) <= set(one.metrics)
            assert len(values) >= len(one.metrics) - 1 and all(v > 0 for v in values.values())
        assert server.cpu_seconds() > 0 and server.wait_idle()


async def _run(server: Server, work: Workload, seed: int) -> dict[str, float]:
    return await work.run(Client(server, lambda text: len(text.split())), seed)


def test_each_metric_has_one_workload() -> None:
    for quick in (True, False):
        plan = workloads(quick=quick)
        names = [name for work in plan for name in work.metrics]
        assert len(names) == len(set(names))
        assert {1, 4, 16} <= {work.streams for work in plan}


def test_the_bandwidth_is_measured() -> None:
    assert 1e8 < read_bandwidth(1, mebibytes=8, passes=2) < 1e13


@pytest.mark.parametrize("module", ["compare", "quality"])
def test_the_scripts_explain_wrong_use(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "no-such-model"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{module}: ") and "Traceback" not in done.stderr
