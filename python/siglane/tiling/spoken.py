"""Numbers and times as prompts of videos have them, in English."""

from __future__ import annotations

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number below a million as num2words writes it: "one thousand, one hundred and twenty-eight"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{ONES[number // 100]} hundred" + (f" and {in_words(number % 100)}" if number % 100 else "")
    thousands, rest = divmod(number, 1000)
    joint = " and" if rest < 100 else ","
    return f"{in_words(thousands)} thousand" + (f"{joint} {in_words(rest)}" if rest else "")


def minutes(seconds: float) -> str:
    """MM:SS, cut to whole seconds."""
    whole, rest = divmod(int(seconds), 60)
    return f"{whole:02d}:{rest:02d}"
