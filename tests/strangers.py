"""A decoder class that no table knows: own names, no MLP module, attention with and without a key-value cache."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

WIDTH, WIDE, HEADS = 32, 48, 4


class StrangerConfig(PretrainedConfig):
    """Sizes of a stranger."""

    model_type = "stranger"
    num_hidden_layers = 3

    def __init__(self, tiers: int = 3, vocab_size: int = 400, **others: Any) -> None:
        super().__init__(**others)
        self.tiers, self.vocab_size = tiers, vocab_size


class Tier(nn.Module):
    """One block: attention, then a widening and a narrowing projection that are the block's own children."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.look = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"})
        self.wide, self.narrow = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)

    def forward(self, hidden_states: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        normed = nn.functional.layer_norm(hidden_states, (WIDTH,))
        split = (*normed.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (self.look[name](normed).view(split).transpose(1, 2) for name in "qkv")
        if cache is not None:
            k, v = cache.update(k, v, self.number)
        scores = q @ k.transpose(-1, -2) / math.sqrt(split[-1]) + mask[:, None, -q.shape[2] :]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(normed.shape)
        hidden_states = hidden_states + self.look["o"](mixed)
        return hidden_states + self.narrow(torch.relu(self.wide(nn.functional.layer_norm(hidden_states, (WIDTH,)))))


class Trunk(PreTrainedModel):
    """Embeddings and blocks."""

    config_class = StrangerConfig

    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.words, self.places = nn.Embedding(config.vocab_size, WIDTH), nn.Embedding(128, WIDTH)
        self.tiers = nn.ModuleList(Tier(number) for number in range(config.tiers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_others: Any,
    ) -> Any:
        rows, here = input_ids.shape
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(rows, before + here, dtype=torch.long)
        if position_ids is None:
            position_ids = torch.arange(before, before + here).expand(rows, -1)
        total = attention_mask.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        seen = causal & attention_mask[:, None].bool()
        hidden = self.words(input_ids) + self.places(position_ids)
        mask = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, -1e9)
        for tier in self.tiers:
            hidden = tier(hidden, mask, past_key_values)
        return hidden


class Stranger(PreTrainedModel):
    """Takes no cache: whatever is given, it reads only what stands in `input_ids`."""

    config_class = StrangerConfig
    base_model_prefix = "trunk"
    caches = False

    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.speak = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.words

    def get_output_embeddings(self) -> nn.Module | None:
        return self.speak

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        cache = past_key_values if self.caches else None
        if not self.caches and inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = inputs["attention_mask"][:, -input_ids.shape[1] :]
        hidden = self.trunk(input_ids, past_key_values=cache, **inputs)
        return CausalLMOutputWithPast(logits=self.speak(hidden), past_key_values=cache)


class CachedStranger(Stranger):
    """Takes a cache."""

    caches = True


S = TypeVar("S", bound=Stranger)


def stranger(kind: type[S], seed: int = 0) -> S:
    """A random one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(StrangerConfig(bos_token_id=0, eos_token_id=1))
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(0, 0.15)
    return model.eval()


AutoConfig.register("stranger", StrangerConfig)
AutoModelForCausalLM.register(StrangerConfig, Stranger)


class Pool(nn.Module):
    """A mixture of experts in which no name says so: a matrix for each, or a list of modules, and a router."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.picks = nn.Linear(WIDTH, 4, bias=False)
        both = [nn.Sequential(nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)) for _ in range(4)]
        self.many = nn.ModuleList(both) if listed else None
        self.inner, self.outer = nn.Parameter(torch.zeros(4, WIDE, WIDTH)), nn.Parameter(torch.zeros(4, WIDTH, WIDE))
        if listed:
            self.inner = self.outer = None

    def forward(self, states: Tensor) -> Tensor:
        share = self.picks(states).softmax(-1)
        if self.many is not None:
            gave = torch.stack([one(states) for one in self.many], -1)
        else:
            gave = torch.einsum("edw,ewh,bth->btde", self.outer, self.inner, states)
        return (gave * share.unsqueeze(2)).sum(-1)
