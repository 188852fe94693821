"""What a small export is made of: random weights, the facts of its card, a forward to compare it with."""

import torch

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.hf.adapter import adapter_for
from basestone.trainer.hub.card import CardFacts

TEXT = "".join(f"def function_{i}(value):\n\treturn value + {i}\n" for i in range(300))

FACTS = CardFacts(
    name="tiny | <model>",
    step=1200,
    tokens=1_572_864,
    heldout={"python": {"loss": 2.5, "perplexity": 12.1825, "bits_per_byte": 1.25, "tokens": 65536}},
    hardware="2 x test device",
    joules=7.2e6,
    joules_source="nvml-counter",
    g_co2e=739.0,
    licence="apache-2.0",
    data="Documentation and sources.",
    loss_curve=[(step, 9.0 - step / 200) for step in range(1, 1201)],
    versions={"torch": "2.x"},
)


class Weights:
    """A source of random weights, which can be spoilt."""

    def __init__(self, config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tensors = {
            name: torch.randn(row.shape, generator=generator) * 0.2 + (row.kind == "norm")
            for name, row in layout_of(config).items()
        }

    def names(self):
        return self.tensors.keys()

    def read(self, name, dtype=torch.float32):
        return self.tensors[name].to(dtype)


def hf_trace(config, weights, dtype=torch.bfloat16, parts=None):
    """Build the class in memory from the rounded weights: a forward that never touches the directory.

    `parts` may change what is traced.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = adapter_for(config)
    fields = adapter.hf_config(config, dtype=torch.float32, bos=1, eos=2, pad=3)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval().float()
    state = {t.name: adapter.read(t, weights.read).to(dtype).float() for t in adapter.tensors(config)}
    model.load_state_dict(state)

    def trace(batch):
        ids = batch["tokens"]
        assert list(batch) == ["tokens"] and ids.dtype == torch.int64
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.model.layers
        ]
        with torch.no_grad():
            logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        rows = [("the embedding", model.model.embed_tokens(ids))]
        rows += [(f"layer {number}", out) for number, out in enumerate(seen)]
        rows = [*rows, ("the logits", logits)]
        yield from rows if parts is None else parts(rows)

    return trace


SAMPLES = {"tokens": torch.randint(400, (2, 48), generator=torch.Generator().manual_seed(5))}


def assert_nothing_left(tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == []
