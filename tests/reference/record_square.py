"""Record how many queries the official Square Attack needs on the three models of `apgd.npz`, into `square.npz` beside this file.

Needs what `record_apgd.py` needs. For every setting the official `attack_single_run` runs once per seed on the first 64 samples
of `aa_standard/x` that the model classifies rightly.

    python tests/reference/record_square.py

Arrays: `version` (3,) torch, numpy, commit; `setting` (S,) "model/norm/eps/targeted"; `budget`; `seeds`; `rows/{model}` (64,) rows of
`aa_standard/x`; `queries/{setting}` (seeds, 64) int16, queries until the first success, the first point included, -1 for none.
"""

# ruff: noqa: T201  (a script: it reports on stdout)

import numpy as np
import torch
from autoattack.square import SquareAttack
from torch import Tensor, nn

from models import RECORD, load_reference

COMMIT = "a39220048b3c9f2cca9a4d3a54604793c68eca7e"
BUDGET, SEEDS, COUNT = 500, 5, 64
SETTINGS = [("mlp", "Linf", 0.1, False), ("conv", "Linf", 0.1, False), ("conv", "Linf", 0.15, True)]
SETTINGS += [("mlp", "L2", 0.6, False), ("conv", "L2", 0.6, False), ("conv", "L2", 1.0, True)]


class Watching(nn.Module):
    """The number of the first query of each sample that succeeds; the official code asks only for those left."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, targeted: bool) -> None:
        super().__init__()
        self.net, self.y, self.targeted, self.looks = net, y, targeted, 0
        self.first = torch.full((len(x),), -1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        self.looks += 1
        open_rows = (self.first < 0).nonzero().squeeze(1)
        hit = (output.argmax(1) == self.y[open_rows]) == self.targeted
        self.first[open_rows[hit]] = self.looks
        return output.clone()


def main() -> None:
    torch.set_num_threads(1)
    models = load_reference().models
    with np.load(RECORD, allow_pickle=False) as archive:
        pixels, labels = torch.from_numpy(archive["aa_standard/x"]), torch.from_numpy(archive["aa_standard/y"]).long()
    everything = pixels.float().view(-1, 1, 8, 8) / 16
    arrays = {"version": np.array([torch.__version__, np.__version__, COMMIT]), "budget": BUDGET, "seeds": SEEDS}
    arrays["setting"] = np.array([f"{model}/{norm}/{eps}/{int(aimed)}" for model, norm, eps, aimed in SETTINGS])
    for model, norm, eps, aimed in SETTINGS:
        net = models[model]
        output = net(everything)
        rows = (output.argmax(1) == labels).nonzero().squeeze(1)[:COUNT]
        second = output.scatter(1, labels[:, None], -torch.inf).argmax(1)
        x, y = everything[rows], (second if aimed else labels)[rows]
        runs = []
        for seed in range(SEEDS):
            watching = Watching(net, x, y, aimed)
            attack = SquareAttack(watching, norm=norm, eps=eps, n_queries=BUDGET - 1, targeted=aimed, loss="margin")
            attack.init_hyperparam(x)
            torch.manual_seed(seed)
            attack.attack_single_run(x, y)
            runs.append(watching.first.numpy().astype(np.int16))
        queries = np.stack(runs)
        arrays[f"rows/{model}"] = rows.numpy().astype(np.int16)
        arrays[f"queries/{model}/{norm}/{eps}/{int(aimed)}"] = queries
        print(
            model, norm, eps, aimed, [float(((queries > 0) & (queries <= n)).mean()) for n in (100, 500)], np.median(queries[queries > 0])
        )
    np.savez_compressed(RECORD.with_name("square.npz"), **arrays)


if __name__ == "__main__":
    main()
