"""Runs of several shards as one."""

from collections.abc import Iterable

from pytest_gpumem.records.run import SCHEMA, RunRecord


def merge(runs: dict[str, RunRecord]) -> RunRecord:
    """Return the shards of one suite as one run, by the name of each.

    The name takes the place of the host, so that equally named workers stay apart.
    """
    shards = [_of_shard(name, run) for name, run in runs.items()]
    return RunRecord(
        schema=SCHEMA,
        mode=" and ".join(dict.fromkeys(run.mode for run in shards)),
        cards=tuple(dict.fromkeys(card for run in shards for card in run.cards)),
        simulated=any(run.simulated for run in shards),
        workers=sum(run.workers for run in shards),
        tests=tuple(test for run in shards for test in run.tests),
        notes=tuple(dict.fromkeys(note for run in shards for note in run.notes)),
        context=max(run.context for run in shards),
        budgets=tuple(verdict for run in shards for verdict in run.budgets),
        command=_common(run.command for run in shards),
        commit=_common(run.commit for run in shards),
        lost=tuple(each for run in shards for each in run.lost),
        collected=sum(run.collected for run in shards)
        if all(run.collected for run in shards)
        else 0,
        worker_ram=max((run.worker_ram for run in shards), default=0),
    )


def _common(texts: Iterable[str]) -> str:
    """Return what all of them are, "" where they differ."""
    found = set(texts)
    return found.pop() if len(found) == 1 else ""


def _of_shard(name: str, run: RunRecord) -> RunRecord:
    def placed(host: str) -> str:
        return f"{name}/{host}" if host else name

    return run._replace(
        cards=tuple(card._replace(host=placed(card.host)) for card in run.cards),
        tests=tuple(test._replace(host=placed(test.host)) for test in run.tests),
    )
