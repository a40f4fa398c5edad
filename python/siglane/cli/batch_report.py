"""What a batch shows while it runs, and says at its end."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self, TextIO

from tqdm import tqdm

from siglane.cli.output import emit_json, emit_line

if TYPE_CHECKING:
    from siglane.batch.form import Answer
    from siglane.batch.output import Output
    from siglane.batch.row import BadRow, Row, Source

TOKENS = ("prompt_tokens", "completion_tokens")
STOPPED = 3  # exit code: not done, and the same command continues


class Report:
    """Counts what is written, shows it while the batch runs, says it at the end. stopped: why it ended early;
    table_rows: of the table that the answers were made into."""

    def __init__(self, output: Output, source: Source, found: int) -> None:
        self._output, self._found, self._total = output, found, source.count
        self.stopped: str | None = None
        self.table_rows: int | None = None
        self._answered = self._images = 0
        self._tokens: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._began = time.monotonic()
        self._bar = tqdm(total=self._total, initial=found, unit="row", dynamic_ncols=True, disable=None)

    def __enter__(self) -> Self:
        self._began = time.monotonic()  # rows are asked from now on; until now the model was loaded
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def note(self, row: Row | BadRow, answer: Answer | None) -> None:
        """Called for every row that is written."""
        self._bar.update()
        if answer is None or answer.status >= 400:
            return
        self._answered += 1
        self._ignored.update(answer.ignored)
        self._images += row.images
        usage = answer.body.get("usage", {})
        self._tokens.update({name: usage.get(name, 0) for name in TOKENS})
        seconds = time.monotonic() - self._began
        rates = [f"{self._images / seconds:.1f} images/s"]
        if tokens := self._tokens["completion_tokens"]:
            rates.append(f"{tokens / seconds:.0f} tokens/s")
        self._bar.set_postfix_str(", ".join(rates), refresh=False)

    def close(self, out: TextIO, *, as_json: bool) -> int:
        """The summary; the exit code."""
        self._bar.close()
        found = {
            "output": str(self._output.path),
            "errors": str(self._output.errors_path),
            "finished": self.stopped is None,
            "answered": self._answered,
            "failed": dict(self._output.failures),
            "found": self._found,
            "images": self._images,
            **{name: self._tokens[name] for name in TOKENS},
            "table_rows": self.table_rows,
            "seconds": round(time.monotonic() - self._began, 3),
            "ignored_fields": dict(self._ignored),
        }
        if as_json:
            emit_json(found, out)
        else:
            for line in self._lines():
                emit_line(line, out)
        if self.stopped is not None:
            emit_line(f"siglane: {self.stopped}", sys.stderr)
        return 0 if self.stopped is None else STOPPED

    def _lines(self) -> Iterator[str]:
        seconds = time.monotonic() - self._began
        failed, (read, written) = self._output.failures.total(), (self._tokens[name] for name in TOKENS)
        tokens = f", {read} + {written} tokens" if read or written else ""
        yield (
            f"{self._output.path}: {self._answered} answered, {failed} failed, {self._found} found there; "
            f"{self._images} images{tokens} in {seconds:.1f} s"
        )
        if failed:
            kinds = ", ".join(f"{count} {code}" for code, count in self._output.failures.most_common())
            yield f"{self._output.errors_path}: {kinds}"
        if self.table_rows is not None:
            yield f"{self._output.path.with_suffix('.parquet')}: {self.table_rows} rows"
        if self._ignored:
            yield "fields without effect: " + ", ".join(f"{name} ({count})" for name, count in self._ignored.items())
