"""Eight threads that train, infer, consolidate, restore, pool and unload, on a simulated card.

``python tests/soak/sleepers_race.py [--seconds 600] [--seed 0] [--compiled]``. What was
trained is compared, bit for bit, with twins that took as many steps and never slept; each answer
with the one that is known.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY = "/dev/shm"  # noqa: S108  # a directory of a random name is made there

SUITE = """
import copy, faulthandler, os, random, threading, time, traceback
import pytest, torch
from pytest_gpumem import ArchiveStore, GpuConsolidator, ModelPool

torch.set_num_threads(1)
SECONDS = float(os.environ["RACE_SECONDS"])
OPTIMIZERS = [lambda p: torch.optim.Adam(p, 0.01), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
              lambda p: torch.optim.AdamW(p, 0.01, foreach=False)]

def model(seed):
    torch.manual_seed(seed)
    first = torch.nn.Embedding(99, 64)  # is not read on the way back
    linear = torch.nn.Linear
    return torch.nn.Sequential(first, linear(64, 64), torch.nn.Tanh(), linear(64, 64))

def step(model, optimizer, number):
    x = torch.arange(4, device="cuda") * (1 + number % 7)
    optimizer.zero_grad()
    model(x).pow(2).mean().backward()
    optimizer.step()
    with torch.no_grad():  # in place, without a graph: nothing but the GIL counts such a user
        model[0].weight.mul_(0.999)
        model[3].bias.data.add_(1e-4)

faulthandler.dump_traceback_later(2 * SECONDS + 300, exit=True)  # who hangs is to be seen

@pytest.mark.filterwarnings("error")  # torch's engine warns of a gradient unlike its parameter
def test_race(tmp_path):
    consolidator = GpuConsolidator(ArchiveStore(tmp_path / "s", key=b"k" * 32))
    pool = ModelPool(consolidator)
    models = [model(seed).cuda() for seed in range(3)]
    optimizers = [make(m.parameters()) for make, m in zip(OPTIMIZERS, models)]
    still = [model(10 + seed).cuda() for seed in range(2)]
    still[1][0].weight = still[0][0].weight
    x = torch.tensor([3, 7], device="cuda")
    answers = [m(x).detach().clone() for m in still]
    pooled = {f"m{seed}": model(20 + seed) for seed in range(3)}
    known = {name: copy.deepcopy(m).cuda()(x).detach().clone() for name, m in pooled.items()}
    steps, counts, errors, lock = [0] * 3, {}, [], threading.Lock()
    until = time.monotonic() + SECONDS

    def count(what, by=1):
        with lock:
            counts[what] = counts.get(what, 0) + by

    def worker(role):
        def decorated():
            name = threading.current_thread().name
            chance = random.Random(os.environ["RACE_SEED"] + role.__name__ + name)
            try:
                while time.monotonic() < until and not errors:
                    role(chance)
            except BaseException:
                errors.append(traceback.format_exc())
        return decorated

    def train(at):
        def training(chance):
            step(models[at], optimizers[at], steps[at])
            steps[at] += 1
            time.sleep(chance.choice([0, 0.01, 0.05, 0.1]))
        return training

    def infer(chance):
        at = chance.randrange(2)
        with chance.choice([torch.no_grad, torch.inference_mode])():
            assert torch.equal(still[at](x), answers[at])
        count("inferred")
        time.sleep(chance.choice([0, 0.01, 0.05]))

    def consolidate(chance):
        everything = [*models, *optimizers, *still]
        chosen = chance.sample(everything, chance.randrange(1, len(everything)))
        done = consolidator.consolidate_gpu_memory([{"data": each} for each in chosen])
        foreign = [each for each in done.refused if " now: " not in each]
        assert not foreign, foreign
        count("asleep", len(done.ids))
        count("refused as in use", len(done.refused))
        if len(consolidator.store.entries()) > 200:
            count("forgotten", consolidator.store.forget(keep_last=20).decayed)

    def restore(chance):
        consolidator.restore(chance.choice([None, *models, *still]))
        count("restored")
        time.sleep(0.02)

    def use_pool(chance):
        name = chance.choice(list(pooled))
        with pool.use(name, lambda: copy.deepcopy(pooled[name])) as found:
            assert torch.equal(found(x), known[name])
        count("pooled")
        action = chance.randrange(6)
        if action == 0:
            del found
            pool.unload(name)
            count("unloaded")
        elif action < 3:
            count("pool consolidated", pool.consolidate() > 0)

    roles = [train(0), train(1), train(2), infer, consolidate, restore, use_pool, use_pool]
    threads = [threading.Thread(target=worker(role), name=str(at)) for at, role in enumerate(roles)]
    [each.start() for each in threads]
    [each.join(SECONDS + 120) for each in threads]
    assert not any(each.is_alive() for each in threads), "a thread hangs"
    assert not errors, errors[0]
    print(f"RACE steps {steps}, {counts}")
    for at in range(3):
        twin = model(at).cuda()
        optimizer = OPTIMIZERS[at](twin.parameters())
        for number in range(steps[at]):
            step(twin, optimizer, number)
        for one, other in zip(models[at].parameters(), twin.parameters()):
            assert torch.equal(one, other), f"model {at} lost a step"
    assert counts["asleep"] > SECONDS / 5
"""


def main() -> int:
    """Run the race; return 0 if nothing was lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    memory = MEMORY if Path(MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as where:
        Path(where, "test_race.py").write_text(SUITE)
        Path(where, "pytest.ini").write_text("[pytest]\n")
        card = ["--gpumem-simulate=400MiB", "--gpumem-simulate-context=1MiB"]
        card += ["--gpumem-simulate-compiled"] if options.compiled else []
        plain = ["-q", "-s", "-p", "no:cacheprovider", f"--basetemp={where}/base"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "gpumem", *card, *plain],
            cwd=where,
            env=os.environ
            | {
                "RACE_SECONDS": str(options.seconds),
                "RACE_SEED": str(options.seed),
                "XDG_CONFIG_HOME": where,
            },
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
