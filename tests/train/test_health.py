from __future__ import annotations

import torch

from ultra.train.health import HISTORY, Gate, documents, rerun, rerun_on_reference

CPU = torch.device("cpu")


def check(gate: Gate, norm: float, step: int = 0, loss: float = 1.0) -> bool:
    return bool(gate(torch.tensor(loss), torch.tensor(norm), step))


def test_not_finite_is_bad_from_the_first_step_on() -> None:
    for value in (float("nan"), float("inf")):
        assert check(Gate(100.0, CPU), value)
        assert check(Gate(100.0, CPU), 1.0, loss=value)
    assert not check(Gate(100.0, CPU), 1e6)  # nothing to compare with yet


def test_spike_needs_both_the_threshold_and_ten_medians() -> None:
    gate = Gate(100.0, CPU)
    assert not any(check(gate, 1.0, step) for step in range(20))
    assert not check(gate, 99.0, 20)  # far above the median, below the threshold
    assert check(gate, 101.0, 21)
    high = Gate(100.0, CPU)
    assert not any(check(high, 90.0, step) for step in range(20))
    assert not check(high, 899.0, 20)
    assert check(high, 901.0, 21)


def test_bad_norms_do_not_enter_the_median() -> None:
    gate = Gate(100.0, CPU)
    for step in range(20):
        check(gate, 1.0, step)
    for step in range(20, 60):
        assert check(gate, float("nan"), step)
    assert check(gate, 101.0, 60)
    assert not check(gate, 1.0, 61)


def test_state_round_trip_is_exact() -> None:
    gate, other = Gate(100.0, CPU), Gate(100.0, CPU)
    for step in range(HISTORY + 3):
        check(gate, 0.1 + step / 7, step)
    gate.norms[5] = float("nan")
    other.load_state(gate.state())
    assert torch.equal(gate.norms.nan_to_num(-1), other.norms.nan_to_num(-1))


def test_documents_of_a_batch(tiny) -> None:
    batch = tiny.Data(tiny.config()).batch(0, 3)
    batch.labels[0, 24:48] = -100
    parts = list(documents(batch))
    assert [part.cu_seqlens.tolist() for part in parts] == [[0, 24], [0, 24]]
    assert torch.equal(parts[1].input_ids, batch.input_ids[:, 48:])
    assert sum(part.num_labelled for part in parts) == int((batch.labels != -100).sum())


def test_a_step_made_again_names_the_module_the_gradient_and_the_document(tiny) -> None:
    model, data = tiny.Model(dropout=0.0), tiny.Data(tiny.config())
    batches, seeds = [data.batch(0, 3), data.batch(3, 3)], [0, 1]
    for batch in batches:
        batch.input_ids[batch.input_ids == 31] = 30
    batches[1].input_ids[0, 30] = 31  # id 31 in one document alone
    sound = rerun(model, batches, seeds, CPU, None), rerun_on_reference(model, batches, CPU)
    for again in sound:
        assert again.found == [] and bool(again.loss.isfinite())
    # Sums of the same terms in another order.
    torch.testing.assert_close(sound[0].norm, sound[1].norm, rtol=1e-4, atol=0)

    with torch.no_grad():
        model.left.weight[0, 0] = float("nan")
    assert rerun(model, batches, seeds, CPU, None).found == ["left (Linear)"]
    with torch.no_grad():
        model.left.weight[0, 0] = 0.0
    hook = model.right.weight.register_hook(lambda grad: grad * torch.inf)  # a fault of the backward pass alone
    assert rerun(model, batches, seeds, CPU, None).found == ["gradient of right.weight"]
    hook.remove()

    with torch.no_grad():
        model.embedding.weight[31] = 1e38  # overflows wherever it is looked up
    bad = rerun_on_reference(model, batches, CPU)
    assert "document 1 of the micro-batch that begins at sample 3" in bad.found
    assert not bool(bad.norm.isfinite())
    assert all(param.grad is None for param in model.parameters())
