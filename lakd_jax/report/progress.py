"""Displays training progress: a live line on a terminal, plain lines elsewhere."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any, Self, TextIO

from lakd_jax.report import summary

PLAIN_WIDTH = 160  # characters, since logs are read in editors and web pages
REDRAW_SECONDS = 0.1  # faster is unreadable, and too much for slow connections
_GAP = "  "
_TERM_RANK = 10


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the line; pieces of higher rank are dropped first."""

    rank: int
    text: str
    style: str = ""


def fit(pieces: Sequence[Piece], width: int) -> list[Piece]:
    """Returns the pieces, in order, that fit into `width` characters.

    Loss terms are dropped first, starting with the last one; "+N more" replaces
    them as long as one remains. If even the piece of lowest rank is too long, it is
    truncated.
    """
    order = sorted(pieces, key=lambda piece: piece.rank)
    for count in range(len(order), 0, -1):
        kept = _mark_hidden(pieces, order[count - 1].rank)
        if len(_join(kept)) <= width:
            return kept
    return [dataclasses.replace(order[0], text=order[0].text[: max(width, 0)])]


def _mark_hidden(pieces: Sequence[Piece], highest: int) -> list[Piece]:
    kept = [piece for piece in pieces if piece.rank <= highest]
    hidden = sum(piece.rank > highest for piece in pieces)
    if hidden and highest >= _TERM_RANK:
        last = max(range(len(kept)), key=lambda i: kept[i].rank)
        kept.insert(last + 1, Piece(highest, f"+{hidden} more", "dim"))
    return kept


def _join(pieces: Sequence[Piece]) -> str:
    return _GAP.join(piece.text for piece in pieces)


class Progress:
    """Displays the progress of training; a context manager.

    On a terminal, one line is redrawn in place and notes appear above it; elsewhere,
    every call prints one plain line. A broken stream (closed pipe, lost terminal)
    silences the display and does not stop training. With several processes, only the
    first one displays anything.
    """

    def __init__(
        self, total_steps: int, steps_per_epoch: int, *, stream: TextIO | None = None
    ):
        """Prepares the display.

        Args:
          total_steps: steps of the entire run, including those before a resume.
          steps_per_epoch: converts steps to epochs.
          stream: where to write; None is sys.stderr at the time of entering.
        """
        self._total = total_steps
        self._per_epoch = steps_per_epoch
        self._given_stream = stream
        self._live: Any = None
        self._pieces: list[Piece] = [Piece(0, "waiting for the first step", "dim")]
        self._first: tuple[int, float] | None = None
        self._drawn = -math.inf
        self._broken = False

    def __enter__(self) -> Self:
        from lakd_jax.runtime import hosts

        self._stream = self._given_stream or sys.stderr
        self._broken = not hosts.is_first()
        if self._broken:
            return self
        with self._unless_broken():
            self._live = _live_display(self._stream)
            if self._live is not None:
                self._live.start()
                self._draw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._live is not None:
            with self._unless_broken():
                self._draw()
            with self._unless_broken():  # restores the cursor and sys.stdout
                self._live.stop()

    def update(
        self, step: int, values: dict[str, float], images_per_second: float
    ) -> None:
        """Displays the state after `step` completed steps.

        Args:
          step: completed steps, 1 to total_steps.
          values: loss terms by name; "loss" (the total) comes first, then as many
            of the others as fit.
          images_per_second: training speed; omitted unless positive and finite.
        """
        if self._broken:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        self._pieces = self._line(step, values, images_per_second, now)
        if self._live is None:
            self._print(_join(fit(self._pieces, PLAIN_WIDTH)))
        elif now - self._drawn >= REDRAW_SECONDS or step >= self._total:
            with self._unless_broken():
                self._draw()

    def note(self, text: str) -> None:
        """Prints `text` on separate lines, above the live line if there is one."""
        if self._broken:
            return
        if self._live is None:
            self._print(text)
            return
        from rich import text as rich_text

        with self._unless_broken():
            self._draw()  # a note must not appear above an outdated step
            # With soft_wrap the terminal wraps long lines, so they can be copied whole.
            self._live.console.print(rich_text.Text(text), soft_wrap=True)

    def epoch_line(
        self, epoch: float, split: str, accuracy: float, loss: float
    ) -> None:
        """Prints the result of an evaluation; `accuracy` is a fraction of 1.

        For example "epoch 3  minival 91.2 %  loss 0.41".
        """
        self.note(
            f"epoch {epoch:.4g}  {split} {100 * accuracy:.1f} %  loss {_short(loss, 3)}"
        )

    def _line(
        self, step: int, values: dict[str, float], speed: float, now: float
    ) -> list[Piece]:
        epochs = f"{step / self._per_epoch:.2f}/{self._total / self._per_epoch:.4g}"
        pieces = [
            Piece(0, f"step {step}/{self._total}", "bold"),
            Piece(3, f"epoch {epochs}"),
        ]
        if "loss" in values:
            pieces.append(Piece(1, f"loss {_short(values['loss'], 4)}", "bold"))
        terms = [(name, v) for name, v in values.items() if name != "loss"]
        for index, (name, value) in enumerate(terms):
            if self._live is not None:
                name = re.sub(r"^module(?=\d)", "m", name)
            pieces.append(Piece(_TERM_RANK + index, f"{name} {_short(value, 3)}"))
        if math.isfinite(speed) and speed > 0:
            pieces.append(Piece(4, f"{speed:,.0f} images/s", "dim"))
        pieces.append(Piece(2, f"ETA {self._remaining(step, now)}", "dim"))
        return pieces

    def _remaining(self, step: int, now: float) -> str:
        # Measured from the first update, which excludes compilation. Evaluations
        # and checkpoints are included, since more of them follow.
        assert self._first is not None
        first_step, first_time = self._first
        if step <= first_step:
            return "-:--:--"
        pace = (now - first_time) / (step - first_step)
        return summary.duration(pace * max(self._total - step, 0))

    def _draw(self) -> None:
        from rich import text as rich_text

        width = _columns(self._stream)
        self._live.console.width = width
        # The last column stays empty: some terminals wrap once it is filled.
        kept = fit(self._pieces, width - 1)
        line = rich_text.Text(_GAP, no_wrap=True, overflow="crop").join(
            [rich_text.Text(piece.text, style=piece.style) for piece in kept]
        )
        self._live.update(line, refresh=True)
        self._drawn = time.monotonic()

    def _print(self, text: str) -> None:
        with self._unless_broken():
            self._stream.write(text + "\n")
            self._stream.flush()

    @contextlib.contextmanager
    def _unless_broken(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._broken = True


def _short(value: float, digits: int) -> str:
    """Formats `value` at a constant width, to avoid flicker: 12.3, 1.23, 0.12.

    Below 1, the leading zero counts as a digit unless fewer than two would remain.
    """
    size = abs(value)
    if size == 0 or 10.0 ** (2 - digits) <= size < 1:
        return f"{value:.{digits - 1}f}"
    return f"{value:#.{digits if size >= 1 else 2}g}".removesuffix(".")


def _live_display(stream: TextIO) -> Any:
    """Returns a rich.live.Live, not yet started; None if lines cannot be redrawn."""
    if not stream.isatty():
        return None
    from rich import console as rich_console
    from rich import live

    console = rich_console.Console(file=stream, force_jupyter=False, highlight=False)
    if not console.is_interactive:  # e.g. TERM=dumb
        return None
    # Output of other code appears above the live line, unless it is redirected to a
    # file: there, rich would divert it from the file to the terminal.
    return live.Live(
        console=console,
        auto_refresh=False,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def _columns(stream: TextIO) -> int:
    # rich would query standard input first, which may be another terminal or none.
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
