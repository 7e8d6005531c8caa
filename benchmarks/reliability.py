#!/usr/bin/env python
"""Is anything lost, or wrong in silence? Kills, other faults, and thousands of bad inputs.

    python benchmarks/reliability.py                              # some minutes: a little of each
    python benchmarks/reliability.py --kills 30 --inputs 5200 --save
    python benchmarks/reliability.py --save --only images prompts # these once more
    python benchmarks/reliability.py --save --only faults --match predict

Needs nothing but the package: it draws its data, and trains the smallest recipe on them. What is
done already, by the same code, isn't done again: an interrupted run goes on; --only does some
sections anew, and keeps the others. With --save: ``benchmarks/results/<machine>/reliability.json``,
where ``commits`` says which code each section is of, and each fault its own. Sections:

kills     A run of 16 iterations with checkpoints and evaluations is killed, -9, up to six times:
          while it starts, at any time, while a checkpoint is being written, within an evaluation.
          After each kill the last checkpoint has to be readable, and not older than before. The run
          is resumed each time; at its end it has to equal an undisturbed one bit for bit: weights,
          averages, optimizer and all else in model_final.pth, model_best.pth, the rows of
          metrics.json without times, results.json, and which checkpoints there are.
faults    Signals, damaged files, two runs in a folder, full disks, bad images, code in files: the
          docstring of each (lib/faults.py) says what should be then, the result what was.
the rest  Families of bad inputs: annotations (eleven formats; read, checked by ``data check`` and
          mapped as in training), images, checkpoints, predictions, prompts, overrides. They are
          made from a seed, of valid files that are written here, by rules (lib/mutations.py): a
          value of another kind or size at a place, a field left out, files cut, other bytes. All of
          a family are tried in one process. Each ends in one of these ways:
            clean      an error of those that the commands show as one line (ValueError, OSError),
                       which is one, and names the file (of overrides: the field)
            accepted   and rightly: what was made of it is what it says. Annotations, predictions:
                       `lib.mutations.Reading.misreading` compares it, place by place, with the
                       good file. Checkpoints: number for number what was saved. Images: the picture
                       that was saved, unless the format has no checksum. Prompts: what is found is
                       called as asked, lies within the image, and scores as it can. Overrides: the
                       run of one iteration left its checkpoint, and no size or period is negative
            unclear    an error of several lines, or one that names no file
            traceback  anything else that is raised; also where ``data check`` fails itself
            wrong      silently: accepted otherwise than rightly; or ``data check`` and training
                       disagree on whether a file is good
            hang       no answer in 60 seconds
            memory     more than 2 GiB for the one input, or ended by the system

Exit status: 0, or 1 if anything was otherwise than it should be.
"""

from __future__ import annotations

import os

# Before torch and transformers are imported: small tensors, and nothing is fetched.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import collections
import json
import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path

from dynamic_dino.console import command
from lib.bad_inputs import FAMILIES
from lib.faults import FAULTS, try_fault
from lib.faulty_runs import RECIPES, Bench, killed_chain
from lib.options import add_output, new_parser, place_output
from lib.provenance import provenance, write_json
from lib.tables import reliability
from lib.trials import ACCEPTED, CLEAN, OUTCOMES, try_all
from tqdm import tqdm

SECTIONS = ("kills", *FAMILIES, "faults")
EXAMPLES = 5  # kept of each outcome that isn't as it should be


@command
def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=int, default=12, help="default: %(default)s")
    parser.add_argument(
        "--inputs", type=int, default=600, help="of all families together (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one makes other inputs")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument("--match", default="", metavar="TEXT", help="of faults, those called so")
    add_output(parser)
    options = parser.parse_args()
    place_output(options, "reliability")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    about = provenance(("torch", "numpy", "pillow", "transformers"))
    asked = {key: getattr(options, key) for key in ("kills", "inputs", "seed")}
    report = about | {"settings": asked, "commits": {}} | _earlier(options, about["commit"], asked)
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        for section in SECTIONS:
            if options.only and section not in options.only:
                continue
            if section in report["commits"] and not options.only:
                continue
            report["commits"].pop(section, None)
            for part in _section(section, Path(folder), report, options):
                report[section] = json.loads(json.dumps(part).replace(folder, "..."))
                if options.json:
                    write_json(options.json, report)
            report["commits"][section] = about["commit"]
            if options.json:
                write_json(options.json, report)
    print(reliability(report))
    return int(bool(odd(report)))


def _earlier(options: argparse.Namespace, commit: str, asked: dict) -> dict:
    """The sections that are kept of the file: those that --only doesn't name, or else what an
    interrupted run of the same code has done. Nothing, where as much wasn't asked for."""
    if options.json is None or not options.json.is_file():
        return {}
    report = json.loads(options.json.read_text())
    if report["settings"] != asked or not (options.only or report["commit"] == commit):
        return {}
    return {key: report[key] for key in (*SECTIONS, "commits") if key in report}


def _section(section: str, folder: Path, report: dict, options: argparse.Namespace):
    """What the section has found, again and again, as there is more of it."""
    if section == "kills":
        yield from _kills(folder, report.get("kills", []), options)
    elif section == "faults":
        yield from _faults(folder, report.get("faults", []), report["commit"], options)
    else:
        yield _inputs(section, folder, options)


def _kills(folder: Path, chains: list[dict], options: argparse.Namespace):
    if options.only:
        chains = []
    bench, recipes = Bench(folder), list(RECIPES)
    logging.disable(logging.NOTSET)  # processes of it print
    with tqdm(total=options.kills, desc="kills", disable=None) as bar:
        while (done := sum(len(chain["kills"]) for chain in chains)) < options.kills:
            bar.update(done - bar.n)
            recipe = recipes[len(chains) % len(recipes)]
            rng = random.Random(f"{options.seed} {len(chains)}")
            chains = [*chains, killed_chain(bench, recipe, rng)]
            yield chains


def _faults(folder: Path, found: list[dict], commit: str, options: argparse.Namespace):
    bench = Bench(folder)
    logging.disable(logging.NOTSET)
    wanted = [name for name in FAULTS if options.match in name]
    results = {row["fault"]: row for row in found}
    if options.only:
        results = {name: row for name, row in results.items() if name not in wanted}
    for name in tqdm([n for n in wanted if n not in results], desc="faults", disable=None):
        results[name] = try_fault(bench, name) | {"commit": commit}
        yield [results[name] for name in FAULTS if name in results]


def _inputs(family: str, folder: Path, options: argparse.Namespace) -> dict:
    Bench(folder)
    logging.disable(logging.CRITICAL)
    make, share = FAMILIES[family]
    count = max(round(options.inputs * share), 1)
    trials = make(folder / family, count, random.Random(f"{options.seed} {family}"))
    counts: collections.Counter = collections.Counter()
    kept: dict[str, list[dict]] = {}
    slowest = 0.0
    for ended in tqdm(try_all(trials), total=len(trials), desc=family, disable=None):
        counts[ended.outcome] += 1
        slowest = max(slowest, ended.seconds)
        if ended.outcome not in (CLEAN, ACCEPTED):
            row = {"input": ended.name[:120], "said": ended.said}
            kept.setdefault(ended.outcome, []).append(row)
    return {
        "tried": len(trials),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "slowest_s": slowest,
        "examples": {outcome: rows[:EXAMPLES] for outcome, rows in kept.items()},
    }


def odd(report: dict) -> list[str]:
    """What isn't as it should be."""
    found = [
        f"kills: {chain['differs'] or chain['checkpoint_lost']}"
        for chain in report.get("kills", [])
        if chain["differs"] or chain["checkpoint_lost"]
    ]
    found += [f"{r['fault']}: {r['otherwise']}" for r in report.get("faults", []) if r["otherwise"]]
    for family in FAMILIES:
        for rows in report.get(family, {}).get("examples", {}).values():
            found += [f"{family}: {row['input']}: {row['said']}" for row in rows]
    return found


if __name__ == "__main__":
    sys.exit(main())
