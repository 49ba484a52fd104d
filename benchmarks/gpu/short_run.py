"""A short real run of one stage on made-up data, with the commands that users type.

    python -m benchmarks.gpu.short_run --stage=mlm --workdir=DIR [--tiny]

It passes if the loss falls, the run resumes after a kill (SIGKILL) from its checkpoint and reaches the last step, and
the export is an embedder with the same vectors. The configuration is :one_gpu; with --tiny, :debug, in seconds on a
CPU. A stage starts from the run of the stage before it if DIR has that, else from random weights. Prints the losses.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np

from benchmarks.gpu.runs import ROOT
from benchmarks.made_up import made_up_texts, made_up_tokenizer
from nomic_jax.data.batches.typical_lengths import DOCUMENT_TOKENS, QUANTILES

STAGES = ("mlm", "contrastive", "finetune")
EVERY = 6  # steps from one checkpoint to the next
STEPS = 16
EPOCH = 4  # steps of an epoch
NEGATIVES = {"one_gpu": 7, "debug": 2}
# Variant and stage -> rows of a batch; for masked-LM also the tokens of a row.
BATCH = {
    "one_gpu": {"mlm": 64, "contrastive": 1024, "finetune": 256},
    "debug": {"mlm": 16, "contrastive": 16, "finetune": 8},
}
ROW_TOKENS = {"one_gpu": 2048, "debug": 64}
LONGEST = {"one_gpu": 512, "debug": 64}
SHORT_TEXT = {"one_gpu": 128, "debug": 32}  # tokens; texts have more in the mean
QUERY_WORDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--workdir", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--tiny", action="store_true", help="the variant :debug")
    args = parser.parse_args()
    folder, variant = args.workdir.absolute(), "debug" if args.tiny else "one_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    run, model = folder / "runs" / args.stage, folder / "models" / args.stage
    data = write_data(folder, args.stage, variant)
    command = ["launch.train", f"--config=configs/{args.stage}.py:{variant}", f"--workdir={run}"]
    command += [f"--config.data.mixture={data}", f"--config.data.cache_dir={folder / 'tokens'}"]
    command += [f"--config.steps={STEPS}", f"--config.checkpoint.every={EVERY}"]
    before = folder / "runs" / STAGES[STAGES.index(args.stage) - 1]
    if args.stage != STAGES[0] and (before / "checkpoints" / str(STEPS)).exists():
        command.append(f"--config.init_from={before}")
    else:
        command.append(f"--config.data.tokenizer={folder / 'tokenizer'}")

    kill_after(command, run / "checkpoints" / str(EVERY))
    printed = call(command)
    resumed = [line for line in printed.splitlines() if "resuming from step" in line]
    if not resumed or "resuming from step 0 " in resumed[0]:
        sys.exit(f"FAILED: the killed run did not resume from a checkpoint:\n{printed}")
    check_losses(run)
    call(["convert.to_hf", str(run), str(model)])
    # On a GPU, both sides round products of float32 to 10 bits of mantissa.
    call(["convert.check", str(run), str(model), "--tolerance=0.001"])


def write_data(folder: Path, stage: str, variant: str) -> Path:
    """Writes the tokenizer and a file of rows, if the file is not there, and returns the file."""
    file = folder / f"{stage}.jsonl"
    if file.exists():
        return file
    (folder / "tokenizer").mkdir(exist_ok=True)
    made_up_tokenizer().save(folder / "tokenizer")
    part = file.with_suffix(".part")
    rows = EPOCH * BATCH[variant][stage]
    with part.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in make_rows(stage, variant, rows))
    part.rename(file)
    return file


def make_rows(stage: str, variant: str, rows: int) -> list[dict[str, Any]]:
    """Rows of words that follow Zipf's law. A query is the rarest words of its document, so pairs can be learned."""
    if stage == "mlm":
        return [{"text": text} for text in documents(rows * ROW_TOKENS[variant] // SHORT_TEXT[variant], variant)]
    per_row = 1 + (NEGATIVES[variant] if stage == "finetune" else 0)
    texts = documents(rows * per_row, variant)
    made = []
    for first in range(0, len(texts), per_row):
        document, *negatives = texts[first : first + per_row]
        # The later in the alphabet, the rarer is a made-up word.
        query = " ".join(sorted(document.split())[-QUERY_WORDS:])
        made.append({"query": query, "document": document} | ({"negatives": negatives} if negatives else {}))
    return made


def documents(count: int, variant: str) -> list[str]:
    lengths = np.interp(np.random.default_rng(0).random(count), QUANTILES, DOCUMENT_TOKENS)
    return made_up_texts(np.clip(lengths, 3 + QUERY_WORDS, LONGEST[variant]).astype(int))


def kill_after(command: list[str], checkpoint: Path) -> None:
    """Starts a command and kills it once ``checkpoint`` exists. If it ends before, this process ends with its error."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=errors)
        try:
            while not checkpoint.exists() and child.poll() is None:
                time.sleep(0.01)
        finally:
            child.kill()
        if child.wait() != -signal.SIGKILL:
            fail(f"{command[0]} ended with code {child.returncode} before it could be killed", errors)
    print(f"killed after the checkpoint of step {checkpoint.name}, {time.monotonic() - started:.0f} s", flush=True)


def call(command: list[str]) -> str:
    """Runs a command to its end, and prints and returns its output. If it fails, this process ends with its error."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        print(f"{done.stdout}{command[0]}: {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode:
            fail(f"{command[0]} ended with code {done.returncode}", errors)
    return done.stdout


def fail(message: str, errors: TextIO) -> NoReturn:
    """Ends this process with the message and the end of what a command wrote to stderr, without progress bars."""
    errors.seek(0)
    lines = [line.rpartition("\r")[2] for line in errors.read().split("\n")]
    sys.exit("\n".join([*lines[-30:], f"FAILED: {message}"]))


def check_losses(run: Path) -> None:
    """Checks that metrics.jsonl has every step once, and that the loss of the last epoch is below that of the first."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in metrics]
    print("losses: " + " ".join(f"{loss:.3f}" for loss in losses), flush=True)
    if [row["step"] for row in metrics] != list(range(1, STEPS + 1)):
        sys.exit(f"FAILED: metrics.jsonl has the steps {[row['step'] for row in metrics]}, not 1 to {STEPS}")
    if not np.mean(losses[-EPOCH:]) < np.mean(losses[:EPOCH]):
        sys.exit("FAILED: the loss does not fall")


if __name__ == "__main__":
    main()
