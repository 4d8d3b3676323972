import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios

import pytest

from lakd_jax.report import progress

TERMS = {f"module{k}/{name}": 0.52 for k in range(1, 10) for name in ("kd", "feature")}


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock by one that only the test advances."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal:
    """The master end of a pseudo terminal; shows what a user would see."""

    def __init__(self, columns):
        self._master, slave = pty.openpty()
        self.resize(columns)
        os.set_blocking(self._master, False)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.raw = ""

    def resize(self, columns):
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def drain(self):
        """Reads the output; otherwise the stream blocks after a few kB."""
        self.stream.flush()
        try:
            while chunk := os.read(self._master, 65536):
                self.raw += chunk.decode()
        except BlockingIOError:
            pass

    def lines(self):
        """Interprets carriage returns and erasures; fails on other cursor moves."""
        self.drain()
        text = re.sub(r"\x1b\[[\d;]*m|\x1b\[\?25[hl]", "", self.raw)
        screen, column = [""], 0
        for token in re.findall(r"\x1b\[\d*[A-Za-z]|.|\n", text, re.DOTALL):
            if token == "\n":
                screen.append("")
            elif token == "\r":
                column = 0
            elif token == "\x1b[2K":
                screen[-1] = ""
            else:
                assert not token.startswith("\x1b"), repr(token)
                screen[-1] = screen[-1][:column] + token + screen[-1][column + 1 :]
                column += 1
        return screen


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    made = Terminal(80)
    yield made
    made.stream.close()
    os.close(made._master)


def test_plain_lines(clock):
    stream = io.StringIO()
    with progress.Progress(440, 44, stream=stream) as display:
        display.update(80, {"loss": 1.5}, 12345.6)
        clock[0] = 5.0
        display.update(100, {"module1/feature": 0.52, "loss": 1.234}, 12345.6)
        display.epoch_line(3, "minival", 0.912, 0.41)
        display.note("checkpoint written")
    assert stream.getvalue().splitlines() == [
        "step 80/440  epoch 1.82/10  loss 1.500  12,346 images/s  ETA -:--:--",
        "step 100/440  epoch 2.27/10  loss 1.234  module1/feature 0.52"
        "  12,346 images/s  ETA 0:01:25",
        "epoch 3  minival 91.2 %  loss 0.41",
        "checkpoint written",
    ]


def test_plain_lines_have_no_escape_codes_even_if_colour_is_forced(monkeypatch, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with progress.Progress(440, 44, stream=stream) as display:
        display.update(1, {"loss": 2.0, **TERMS}, float("nan"))
        display.note("[bold]not markup[/bold]")
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert len(lines) == 2 and len(lines[0]) <= progress.PLAIN_WIDTH
    assert "module1/kd 0.52" in lines[0] and "images/s" not in lines[0]
    hidden = int(re.search(r"\+(\d+) more", lines[0])[1])
    assert hidden + len(re.findall(r"module\d", lines[0])) == len(TERMS)
    assert lines[1] == "[bold]not markup[/bold]"


@pytest.mark.parametrize("width", range(0, 140))
def test_the_line_fits_any_width_and_keeps_what_matters_longest(width):
    display = progress.Progress(440, 44, stream=io.StringIO())
    display._first = (1, 0.0)
    pieces = display._line(100, {"loss": 1.0, **TERMS}, 5000.0, 9.9)
    kept = progress.fit(pieces, width)
    line = "  ".join(piece.text for piece in kept)
    assert len(line) <= width
    order = ["step 100/440", "loss 1.000", "ETA 0:00:34", "epoch", "images/s", "kd"]
    shown = [text in line for text in order]
    assert shown == sorted(shown, reverse=True)
    assert ("more" in line) == ("kd" in line)


@pytest.mark.parametrize(
    ("value", "four", "three"),
    [
        (1234.4, "1234", "1.23e+03"),
        (123.4, "123.4", "123"),
        (1.2, "1.200", "1.20"),
        (0.5, "0.500", "0.50"),
        (0.05, "0.050", "0.050"),
        (0.0004, "0.00040", "0.00040"),
        (-2.5, "-2.500", "-2.50"),
        (0.0, "0.000", "0.00"),
        (float("nan"), "nan", "nan"),
        (float("inf"), "inf", "inf"),
    ],
)
def test_numbers_keep_their_width(value, four, three):
    assert progress._short(value, 4) == four
    assert progress._short(value, 3) == three


def test_terminal_shows_one_line_and_the_notes_above(terminal, clock):
    with progress.Progress(440, 44, stream=terminal.stream) as display:
        assert terminal.lines() == ["waiting for the first step"]
        for step in range(1, 441):
            clock[0] += 0.5
            display.update(step, {"loss": 1.25, **TERMS}, 12345.0)
            terminal.drain()
            if step % 44 == 0:
                display.epoch_line(step / 44, "minival", 0.9, 0.4)
        screen = terminal.lines()
    assert screen[:10] == [
        f"epoch {epoch}  minival 90.0 %  loss 0.40" for epoch in range(1, 11)
    ]
    assert len(screen) == 11
    assert screen[10].startswith("step 440/440  epoch 10.00/10  loss 1.250")
    assert screen[10].endswith("12,345 images/s  ETA 0:00:00")
    assert all(len(line) < 80 for line in screen)
    # Afterwards the line stays, and the cursor is visible again below it.
    assert terminal.lines() == [*screen, ""]
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")


def test_terminal_redraws_at_most_ten_times_a_second(terminal, clock):
    with progress.Progress(10**6, 1000, stream=terminal.stream) as display:
        for step in range(1, 1001):
            clock[0] += 0.001
            display.update(step, {"loss": 1.0}, 1.0)
            terminal.drain()
        assert terminal.raw.count("step ") <= 11
    # The last state is drawn at the end, even if its update was skipped.
    assert terminal.lines()[-2].startswith("step 1000/1000000")


def test_a_note_stands_above_the_step_it_belongs_to(terminal, clock):
    with progress.Progress(440, 44, stream=terminal.stream) as display:
        for step in (1, 2, 3):  # too close together to be drawn
            display.update(step, {"loss": 1.0}, 5.0)
        display.note("a [bold]note[/bold] " + "x" * 100)
        note, line = terminal.lines()
        assert note == "a [bold]note[/bold] " + "x" * 100
        assert line.startswith("step 3/440")


def test_terminal_follows_a_change_of_size(terminal, clock):
    with progress.Progress(440, 44, stream=terminal.stream) as display:
        for columns in (200, 40, 20, 5, 120):
            terminal.resize(columns)
            clock[0] += 1.0
            display.update(100, {"loss": 1.0, **TERMS}, 5000.0)
            (line,) = terminal.lines()
            assert columns - 20 < len(line) < columns


def test_prints_from_elsewhere_appear_above_the_line(terminal, clock, monkeypatch):
    elsewhere = os.fdopen(os.dup(terminal.stream.fileno()), "w")
    monkeypatch.setattr(sys, "stdout", elsewhere)
    with progress.Progress(440, 44, stream=terminal.stream) as display:
        clock[0] += 1.0
        display.update(1, {"loss": 1.0}, 5.0)
        print("a warning")
        screen = terminal.lines()
    assert screen[0] == "a warning" and screen[1].startswith("step 1/440")
    assert sys.stdout is elsewhere
    elsewhere.close()


def test_prints_sent_into_a_file_stay_there(terminal, clock, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with progress.Progress(440, 44, stream=terminal.stream):
        print("result")
    assert file.getvalue() == "result\n"


def test_simple_terminals_get_plain_lines(terminal, monkeypatch, clock):
    monkeypatch.setenv("TERM", "dumb")
    with progress.Progress(440, 44, stream=terminal.stream) as display:
        display.update(1, {"loss": 1.0}, 5.0)
        display.update(2, {"loss": 1.0}, 5.0)
    assert len(terminal.lines()) == 3 and "\x1b" not in terminal.raw


def test_exception_leaves_the_terminal_in_order(terminal, clock):
    with pytest.raises(KeyboardInterrupt):
        with progress.Progress(440, 44, stream=terminal.stream) as display:
            display.update(1, {"loss": 1.0}, 5.0)
            raise KeyboardInterrupt
    assert terminal.lines()[-1] == ""
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")


def test_a_closed_pipe_does_not_stop_training(clock):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with progress.Progress(440, 44, stream=stream) as display:
        for step in range(1, 4):
            display.update(step, {"loss": 1.0}, 5.0)
        display.note("still here")
    with pytest.raises(BrokenPipeError):
        stream.close()
