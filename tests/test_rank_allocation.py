"""Ranks over layers: no larger than asked, and no other division of the same size keeps more."""

import builders
import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from peft_perta import UnsupportedLayerError, save_perta_adapter
from peft_perta.adapters import factorize, verify_adapter
from peft_perta.perta._rank_allocation import allocate


def layers(seed, sizes, rank=8):
    """Edits with very different norms and spectra, each fitted at a rank."""
    generator = torch.Generator().manual_seed(seed)
    edits = {}
    for index, (height, width) in enumerate(sizes):
        U = torch.linalg.qr(torch.randn(height, height, generator=generator, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        count = min(height, width)
        decay = float(torch.rand((), generator=generator)) * 3
        S = 10 ** float(torch.randn((), generator=generator)) * torch.arange(1, count + 1).double() ** -decay
        edits[f"layer{index}"] = (U[:, :count] * S) @ V[:, :count].T
    return edits, {name: factorize(edit, rank) for name, edit in edits.items()}


def size(factors):
    return sum(f.A.numel() + f.B.numel() for f in factors.values())


@given(seed=st.integers(0, 2**16), rank=st.integers(1, 4))
def test_it_is_no_larger_than_uniform_ranks_and_keeps_at_least_as_much(seed, rank):
    edits, fitted = layers(seed, [(12, 20), (12, 20), (12, 20), (12, 20)])
    found = allocate(fitted, rank)
    uniform = {name: factorize(edit, rank) for name, edit in edits.items()}
    assert size(found) <= size(uniform)
    kept, before = (sum(f.energy * f.energy_kept for f in of.values()) for of in (found, uniform))
    assert kept >= before * (1 - 1e-9)
    assert all(f.rank >= 1 for f in found.values())
    for name, f in found.items():
        exact = 1 - float((edits[name] - f.B @ f.A).square().sum() / edits[name].square().sum())
        assert f.energy_kept == pytest.approx(exact, abs=1e-9)
        assert f.metric_error == pytest.approx(1 - exact, abs=1e-9)


def test_layers_of_one_size_share_the_largest_singular_values_of_all():
    edits, fitted = layers(3, [(10, 10)] * 3)
    found = allocate(fitted, 3)
    pooled = sorted((float(s) ** 2, name) for name, edit in edits.items() for s in torch.linalg.svdvals(edit)[1:8])[
        ::-1
    ]
    chosen = [name for _, name in pooled[: 9 - 3]]  # beyond the first rank of each
    assert {name: f.rank for name, f in found.items()} == {name: 1 + chosen.count(name) for name in edits}


def test_a_share_is_of_all_layers_together():
    edits, fitted = layers(5, [(12, 20), (8, 16), (20, 9)], rank=9)
    found = allocate(fitted, 0.95)
    total = sum(float(edit.square().sum()) for edit in edits.values())
    kept = sum(f.energy * f.energy_kept for f in found.values())
    assert kept >= 0.95 * total
    assert min(f.energy_kept for f in found.values()) < 0.95, (
        "some layer keeps less, because others keep more per element"
    )


def test_an_edit_of_zeros_gets_one_rank():
    _, fitted = layers(1, [(6, 6), (6, 6)])
    fitted["zero"] = factorize(torch.zeros(6, 6, dtype=torch.float64), 6)
    found = allocate(fitted, 2)
    assert found["zero"].rank == 1
    assert not (found["zero"].B @ found["zero"].A).any()


def test_padded_and_pattern_are_one_edit_and_both_load(tmp_path):
    results = {}
    for allocation in ("padded", "pattern"):
        config, state_dict, provenance = builders.negate(
            builders.adapted_saved_llama(), granularity="delta", rank=3, allocation=allocation
        )
        path = save_perta_adapter(tmp_path / allocation, config, state_dict, provenance)
        loaded = PeftModel.from_pretrained(builders.llama(), path)
        assert loaded.peft_config["default"].r == provenance.rank or allocation == "pattern"
        results[allocation] = laws.deltas_of(load_file(path / "adapter_model.safetensors"))
        with torch.no_grad():
            results[f"{allocation} logits"] = loaded.eval()(input_ids=torch.arange(9).unsqueeze(0)).logits
    ranks = [layer.rank for layer in provenance.layers]
    assert len(set(ranks)) > 1
    for name, delta in results["padded"].items():
        torch.testing.assert_close(results["pattern"][name], delta)
    torch.testing.assert_close(results["pattern logits"], results["padded logits"])
    sizes = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("padded", "pattern")}
    assert sizes["pattern"] < sizes["padded"]
    failed = {name: {check.name for check in verify_adapter(tmp_path / name) if not check.passed} for name in sizes}
    assert failed["padded"] == set()
    assert "llama.cpp, TGI: no patterns" in failed["pattern"]


def test_an_allocation_keeps_more_than_uniform_ranks_end_to_end():
    def negated(**settings):
        return builders.negate(builders.adapted_llama(), granularity="delta", rank=3, **settings)[2]

    assert negated(allocation="pattern").energy_kept > negated().energy_kept


def test_a_share_of_all_layers_end_to_end():
    provenance = builders.negate(builders.adapted_llama(), granularity="delta", rank=0.8, allocation="pattern")[2]
    assert 0.8 <= provenance.energy_kept < 0.9


def test_patterns_of_experts_are_refused():
    with pytest.raises(UnsupportedLayerError, match="allocation='pattern' is not possible for expert parameters"):
        builders.negate(builders.adapted_mixtral(), allocation="pattern")
