"""Networks that petite_fast has never seen: adapt, train five steps, save, load, merge."""

from __future__ import annotations

import copy

import pytest
import torch
from peft_cases import build, inputs, run

from petite_fast import LoraConfig, MixConfig, PeftModel, SSFConfig, get_peft_model

pytest.importorskip("monai")

CONFIGS = {
    "swin": MixConfig(
        encoder=LoraConfig(r=2, target_modules=["qkv"], qkv_parts="qv"),
        decoder=SSFConfig(),
        bitfit=True,
    ),
    "dynunet": LoraConfig(r=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_from_adapting_to_merging(name, tmp_path) -> None:
    base = build(name, torch.float32)
    model = get_peft_model(copy.deepcopy(base), CONFIGS[name]).train()
    x = inputs(name, batch=1, dtype=torch.float32)
    target = 0.5 * x
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = run(model.eval(), x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(loaded, x), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    scale = float(expected.abs().max())
    torch.testing.assert_close(run(merged, x), expected, rtol=1e-4, atol=1e-5 * scale)
    base.load_state_dict(merged.state_dict(), strict=False)
    # float32, and every InstanceNorm3d in these nets that SSF gave a weight is not in `base`
    if name == "dynunet":
        torch.testing.assert_close(run(base, x), expected, rtol=1e-4, atol=1e-5 * scale)
