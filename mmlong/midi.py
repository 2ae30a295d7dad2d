"""Voices of a step grid as a standard MIDI file, so that music can be heard.

Format 1 of the MIDI Manufacturers Association's "Standard MIDI Files 1.0" (1988): a header ``MThd``, then a track ``MTrk`` a voice, of events that each come so many ticks after the one before. A tick is a step, four to a quarter note.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

STEPS = 4
"""Ticks to a quarter note."""
NOTE_ON, NOTE_OFF, LOUD = 0x90, 0x80, 80


def midi_bytes(voices: Sequence[Sequence[int]], rest: int) -> bytes:
    """A file of voices.

    Args:
        voices: of each, step by step, a pitch 0 to 127 that begins, ``rest``, or any other number for one that goes on.
        rest: which number is silence.
    """
    tracks = [_track(voice, channel, rest) for channel, voice in enumerate(voices)]
    return struct.pack(">4sIHHH", b"MThd", 6, 1, len(tracks), STEPS) + b"".join(tracks)


def _track(voice: Sequence[int], channel: int, rest: int) -> bytes:
    events, last, sounding = bytearray(), 0, -1

    def say(step: int, status: int, pitch: int, loud: int) -> None:
        nonlocal last
        events.extend((*variable_length(step - last), status | channel % 16, pitch, loud))
        last = step

    for step, code in enumerate(voice):
        if code <= 127 or code == rest:
            if sounding >= 0:
                say(step, NOTE_OFF, sounding, 0)
            sounding = -1 if code == rest else code
            if sounding >= 0:
                say(step, NOTE_ON, sounding, LOUD)
    if sounding >= 0:
        say(len(voice), NOTE_OFF, sounding, 0)
    events.extend((*variable_length(len(voice) - last), 0xFF, 0x2F, 0))  # the track's end
    return struct.pack(">4sI", b"MTrk", len(events)) + bytes(events)


def variable_length(ticks: int) -> bytes:
    """A number in groups of seven bits, the last without its top bit."""
    found = [ticks & 127]
    while ticks := ticks >> 7:
        found.append(ticks & 127 | 128)
    return bytes(reversed(found))
