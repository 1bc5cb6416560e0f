"""Evaluation against a slow reference; its bits depend on the batch size alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_text

from rnnlm.config import Config, CorpusConfig, ModelConfig, StreamConfig
from rnnlm.data.adopt import adopt
from rnnlm.data.build.build import Build
from rnnlm.data.ring import Ring
from rnnlm.data.stream import TokenStream
from rnnlm.data.substreams import SubstreamDataset
from rnnlm.errors import UserError
from rnnlm.model.evaluate import WARM_UP, WINDOW, _add_in_order, _warm_up, evaluate, share_blocks
from rnnlm.model.language_model import RecurrentLM
from rnnlm.texts import NamedSource


@pytest.fixture
def model() -> RecurrentLM:
    return RecurrentLM(
        ModelConfig(embedding_size=10, hidden_size=12, layers=2, dropout=0.5, init="uniform"), 300, seed=3
    )


def reference(model: RecurrentLM, stream: TokenStream, rows: int, count_eos: bool) -> tuple[float, int]:
    """One substream after the other, one token at a time, in fp64."""
    model = model.double()
    tokens = torch.from_numpy(stream.windows(np.array([0]), len(stream) + 1)[0].astype(np.int64))

    nats, count = 0.0, 0
    for row in range(rows):
        hidden = model.zero_hidden(1)
        begin, end = (edge * len(stream) // rows for edge in (row, row + 1))
        for position in range(max(0, begin - WARM_UP), begin):
            _, hidden = model.next_logits(tokens[None, position : position + 1], hidden)
        for position in range(begin, end):
            logits, hidden = model.next_logits(tokens[None, position : position + 1], hidden)
            target = tokens[position + 1]
            if count_eos or target != stream.manifest.eos_id:
                nats += F.cross_entropy(logits[0], target).item()
                count += 1
    model.float()
    return nats, count


@pytest.mark.parametrize("count_eos", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_every_token_is_scored_once_with_carried_state(model: RecurrentLM, streams, rows: int, count_eos: bool) -> None:  # type: ignore[no-untyped-def]
    stream = TokenStream(streams / "valid")
    found = evaluate(model, stream, rows, count_eos)
    nats, count = reference(model, stream, rows, count_eos)
    manifest = stream.manifest
    assert found.scored_tokens == count
    assert found.nats == pytest.approx(nats, rel=1e-6)

    figures = found.to_dict()
    ends = manifest.documents if count_eos else 0
    assert figures["token_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / (manifest.words + ends)), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / manifest.text_bytes, rel=1e-6)


def test_losses_of_tokens_are_summed_in_fp64(
    model: RecurrentLM, train_stream: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 the sum of a window alone would be off by 1e-8 of it."""
    seen: list[float] = []
    honest = model.token_losses

    def token_losses(*arguments: torch.Tensor) -> Any:
        losses, hidden = honest(*arguments)
        seen.extend(losses.flatten().tolist())
        return losses, hidden

    monkeypatch.setattr(model, "token_losses", token_losses)
    found = evaluate(model, train_stream, 16, True)
    assert found.nats == pytest.approx(math.fsum(seen), rel=1e-13)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 12])
def test_blocks_and_windows_are_each_scored_once_by_all_processes(processes: int) -> None:
    """By the slow way: every (block, window), and who scores it."""
    for blocks in range(1, 14):
        shared = [share_blocks(blocks, process, processes) for process in range(processes)]
        assert len({len(turns) for turns in shared}) == 1, "all take part in each turn"
        for turn, together in enumerate(zip(*shared, strict=True)):
            expected = range(turn * processes, min(blocks, (turn + 1) * processes))
            assert [*dict.fromkeys(block for block, _, _ in together)] == [*expected]
            for wanted in expected:
                of_block = [(share, shares) for block, share, shares in together if block == wanted]
                assert of_block == [(each, len(of_block)) for each in range(len(of_block))]


@pytest.mark.parametrize(("processes", "threads"), [(1, 0), (2, 1), (3, 0), (7, 1)])
def test_the_bits_do_not_depend_on_the_number_of_processes(
    model: RecurrentLM, train_stream: TokenStream, monkeypatch: pytest.MonkeyPatch, processes: int, threads: int
) -> None:
    """20 rows are 2 blocks: of 16, and of 4. Against sums in the order of windows, without any exchange."""
    ring, expected = Ring(len(train_stream), 20, WINDOW), []
    for rows in (range(16), range(16, 20)):
        hidden, sums = _warm_up(model, train_stream, ring.edges(rows.start, rows.stop)[:-1]), [0.0] * len(rows)
        for batch in SubstreamDataset(train_stream, ring, rows.start, rows.stop, 0, ring.windows_per_epoch):
            inputs, targets = batch.to(torch.device("cpu"))
            losses, hidden = model.token_losses(inputs, hidden, targets)
            sums = [total + own for total, own in zip(sums, losses.double().sum(dim=1).tolist(), strict=True)]
        expected += sums

    monkeypatch.setattr("rnnlm.model.evaluate.EXCHANGED", 2)
    scored, honest = list[int](), model.token_losses
    given: list[list[torch.Tensor]] = [[] for _ in range(processes)]
    for process in range(processes):

        def token_losses(*arguments: Any, process: int = process) -> Any:
            scored.append(process)
            return honest(*arguments)

        monkeypatch.setattr(model, "token_losses", token_losses)
        note = lambda own, process=process: (given[process].append(own), own)[1]  # noqa: E731
        evaluate(model, train_stream, 20, True, process, processes, note, prefetch_threads=threads)

    assert len(scored) == 2 * ring.windows_per_epoch and {*scored} == {*range(processes)}, "each window once, by all"
    together = (torch.stack(each).sum(dim=0) for each in zip(*given, strict=True))
    found = evaluate(model, train_stream, 20, True, 0, processes, lambda own: next(together))
    assert found.nats == math.fsum(expected)


@pytest.mark.parametrize("together", [1, 2, 5, 40])
def test_windows_are_added_one_after_the_other_however_many_come_at_once(together: int) -> None:
    """Where the order shows: losses that differ by far more than a number holds."""
    losses = 10.0 ** np.random.default_rng(0).uniform(-20, 0, (3, 40, 2))  # rows, windows, sources
    expected = np.zeros((3, 2))
    for window in range(40):
        expected += losses[:, window]

    totals = np.zeros((3, 2))
    for start in range(0, 40, together):
        _add_in_order(totals, losses[:, start : start + together])
    assert np.array_equal(totals, expected)
    assert not np.array_equal(totals, losses[:, ::-1].sum(axis=1)), "another order has other bits"


def test_how_a_stream_is_cut_changes_its_loss_by_rounding_alone(model: RecurrentLM, train_stream: TokenStream) -> None:
    found = [evaluate(model, train_stream, rows, True).nats for rows in (49, 50)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_more_substreams_than_tokens(model: RecurrentLM, streams) -> None:  # type: ignore[no-untyped-def]
    stream = TokenStream(streams / "valid")
    found = evaluate(model, stream, 10**6, True)
    assert found.scored_tokens == len(stream)
    assert math.isfinite(found.nats)


def test_where_a_stream_is_cut_hardly_matters(model: RecurrentLM, streams) -> None:  # type: ignore[no-untyped-def]
    """A model that forgets slowly, so that what starts from zero shows."""
    for layer in model.layers:
        layer.weight_hh.data.mul_(2)
    stream = TokenStream(streams / "valid")
    whole = evaluate(model, stream, 1, True).loss
    assert evaluate(model, stream, 30, True).loss == pytest.approx(whole, rel=1e-6)


def test_each_source_of_the_corpus_has_its_own_figures(model: RecurrentLM, tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Against a sum over the tokens of each document, one after the other."""
    for seed, name in enumerate(("plays", "letters", "unused")):
        (tmp_path / name).write_text("\n".join(make_text(60 if seed < 2 else 1, seed)))
    corpus = CorpusConfig(train={name: NamedSource(str(tmp_path / name)) for name in ("plays", "letters", "unused")})
    config = Config(corpus=corpus, stream=StreamConfig(directory=str(tmp_path / "streams"), valid_fraction=0.3))
    Build(config, tokenizer).run(lambda size: None)

    stream = TokenStream(tmp_path / "streams/valid")
    tokens = torch.from_numpy(stream.windows(np.array([0]), len(stream) + 1).astype(np.int64))
    losses = model.token_losses(tokens[:, :-1], model.zero_hidden(1), tokens[:, 1:])[0][0].double()
    losses = losses.roll(1)  # of each token as a target; the ring's last input predicts the first one
    expected = {"plays": 0.0, "letters": 0.0, "unused": 0.0}
    begin, lines = 0, (stream.directory / "sources.jsonl").read_text().splitlines()
    for (line, _), (end, _, _) in zip(stream.origins.tolist(), stream.documents.tolist(), strict=True):
        expected[json.loads(lines[line])["source"]] += float(losses[begin:end].sum())
        begin = end

    for rows in (1, 7):
        found = evaluate(model, stream, rows, True)
        assert {name: each["nats"] for name, each in found.sources.items()} == pytest.approx(
            {name: nats for name, nats in expected.items() if nats}, rel=1e-4
        )
        assert sum(each["scored_tokens"] for each in found.sources.values()) == found.scored_tokens == len(stream)
        assert sum(each["nats"] for each in found.sources.values()) == pytest.approx(found.nats)
    assert len(evaluate(model, stream, 7, False).sources) >= 2


def test_a_stream_of_ends_alone_has_nothing_to_score_where_these_do_not_count(
    model: RecurrentLM, tmp_path: Path
) -> None:
    np.full(9, 1, np.uint16).tofile(tmp_path / "t.bin")
    adopt(tmp_path / "t.bin", tmp_path / "ends", 300, 1, "uint16")
    stream = TokenStream(tmp_path / "ends")
    assert evaluate(model, stream, 4, count_eos=True).scored_tokens == 9
    with pytest.raises(UserError, match=r"ends: all its tokens are EOS, and eval.count_eos=false"):
        evaluate(model, stream, 4, count_eos=False)
