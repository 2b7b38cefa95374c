"""Output layers of language models, which turn a state into a logit for each token.

A decoder has a linear head. That of a masked language model is a small transform and a product
with the token table, which it shares with the inputs; most embedders come without, and get a new
one.
"""

from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from tercet.errors import ModelError
from tercet.losses.tokens import Head
from tercet.models.foreign_code import refuse_code
from tercet.models.network.loading import check_network, loading
from tercet.models.zoo import zoo

_TOLERANCE: Final = 1e-3  # of the logits, as a share of their length
_NEW_HEAD: Final = "set head to None to have a new one made"


@torch.no_grad()
def load_head(source: str | Path) -> Head:
    """Return a copy of the head of a decoder at a zoo name, a folder or a hub id, in float32.

    Loads the whole model for a moment, to compare its logits with those of the head on its states.

    Raises:
        ModelError: if the model has no such head, or one that changes logits in an unknown way.
    """
    with loading(f"{source}: has no language-model head"):
        model = _load_with_head(
            AutoModelForCausalLM,
            source,
            "language-model",
            "masked next-token prediction needs them: start from the model that still has its head",
        )
    config = model.config.get_text_config()
    multiplied = float(getattr(config, "logit_scale", None) or 1.0)  # as Cohere does
    divided = float(getattr(config, "logits_scaling", None) or 1.0)  # as Granite does
    linear: Any = model.get_output_embeddings()
    head = Head(
        linear.weight.detach().clone(),
        None if getattr(linear, "bias", None) is None else linear.bias.detach().clone(),
        scale=multiplied / divided,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    ids = torch.arange(8)[None] % len(head.weight)
    states = model.base_model(input_ids=ids).last_hidden_state[0]
    wanted = model.eval()(input_ids=ids).logits[0].float()
    gap = float("inf")
    if states.shape[1] == head.weight.shape[1]:
        gap = float((head.logits(states.float()) - wanted).norm() / wanted.norm())
    if gap > 1e-4:
        raise ModelError(
            f"{source}: its logits are not its head times its states (they differ by {gap:.0%}), "
            "so masked next-token prediction cannot train it"
        )
    return head


def _load_with_head(auto: Any, source: str | Path, kind: str, remedy: str) -> Any:
    """Return the model that a transformers class loads, or raise if its head is missing."""
    place = str(zoo.resolve(str(source)))
    refuse_code(place, "config.json")
    check_network(Path(place))
    model, report = auto.from_pretrained(
        place, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])[0]
        raise ModelError(f"{source}: the weights of its {kind} head are missing ({lost}); {remedy}")
    return model


class MaskedHead(nn.Module):
    """Dense, GELU, norm; then logits by the rows of a token table, and a bias for each row."""

    def __init__(self, hidden: int, rows: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.bias = nn.Parameter(torch.zeros(rows))

    @staticmethod
    @torch.no_grad()
    def new(
        table: Float[Tensor, "vocabulary hidden"], counts: Int[Tensor, "known"]
    ) -> "MaskedHead":
        """Return a head that, before it is trained, predicts how common each token is.

        ``counts`` has the tokens that get logits. The transform begins as near to the identity as
        a GELU allows, with logits that differ by about one.
        """
        head = MaskedHead(table.shape[1], len(counts))
        common = (counts + 1).double()
        nn.init.eye_(head.dense.weight)
        nn.init.zeros_(head.dense.bias)
        head.norm.weight.fill_(1 / max(1.0, float(table.float().norm(dim=1).mean())))
        head.bias.copy_((common / common.sum()).log())
        return head

    @torch.no_grad()
    def narrowed(self, known: Int[Tensor, "known"]) -> "MaskedHead":
        """Return the head with logits for these tokens only."""
        self.bias = nn.Parameter(self.bias[known].clone())
        return self

    def forward(self, states: Float[Tensor, "places hidden"]) -> Float[Tensor, "places hidden"]:
        """Return the states that are multiplied with the token table."""
        return self.norm(F.gelu(self.dense(states)))

    def output(self, rows: Float[Tensor, "known hidden"]) -> Head:
        """Return the product with these rows of the token table, and the bias."""
        return Head(rows, self.bias)


def find_masked_head(source: str | Path) -> MaskedHead | None:
    """Return the output layer of the model at a zoo name, a folder or a hub id, if it has one.

    Loads the whole model for a moment, to compare its logits with those of the head.

    Raises:
        ModelError: if its config promises one that is missing, or that works in an unknown way.
    """
    with loading(f"{source}: its masked-language head cannot be loaded"):
        place = str(zoo.resolve(str(source)))
        refuse_code(place, "config.json")
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        kinds = config.architectures or ()
        if not any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in kinds):
            return None
        remedy = f"its config promises them; {_NEW_HEAD}"
        model = _load_with_head(AutoModelForMaskedLM, source, "masked-language", remedy)
    return _taken_from(model.eval(), str(source))


@torch.no_grad()
def _taken_from(model: Any, source: str) -> MaskedHead:
    table = model.get_input_embeddings().weight
    inside = {id(module) for module in model.base_model.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    square = (table.shape[1], table.shape[1])
    dense = [m for m in outside if isinstance(m, nn.Linear) and m.weight.shape == square]
    norms = [m for m in outside if isinstance(m, nn.LayerNorm)]
    last: Any = model.get_output_embeddings()
    unknown = f"{source}: its masked-language head is not dense, GELU, norm and the token table"
    if len(dense) != 1 or len(norms) != 1 or not torch.equal(last.weight, table):
        raise ModelError(f"{unknown}; {_NEW_HEAD}")
    head = MaskedHead(*reversed(table.shape))
    head.norm.eps = norms[0].eps
    for own, theirs in ((head.dense, dense[0]), (head.norm, norms[0])):
        own.weight.copy_(theirs.weight)
        nn.init.zeros_(own.bias)
        if theirs.bias is not None:
            own.bias.copy_(theirs.bias)
    if getattr(last, "bias", None) is not None:
        head.bias.copy_(last.bias)
    ids = torch.arange(8)[None] % len(table)
    wanted = model(input_ids=ids).logits[0]
    found = head.output(table).logits(head(model.base_model(input_ids=ids).last_hidden_state[0]))
    if (found - wanted).norm() > _TOLERANCE * wanted.norm():
        raise ModelError(f"{unknown}; {_NEW_HEAD}")
    return head
