"""Characters that a page cannot print, or that could turn it upside down, made visible.

Escaping (Jinja2's) keeps text from becoming markup. It does not keep a control character, a lone
surrogate or an override of the writing direction from spoiling what stands around it.
"""

_DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_TABLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    **dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
    **{code: f"⟨U+{code:04X}⟩" for code in _DIRECTION},
    0x09: "\t",
    0x0A: "\n",
    0x0D: "",  # of a line that ends in "\r\n"
    0x7F: "␡",
    0x2028: "\n",
    0x2029: "\n",
    0xFEFF: "",
    0xFFFE: "\N{REPLACEMENT CHARACTER}",
    0xFFFF: "\N{REPLACEMENT CHARACTER}",
}


def visible(text: str) -> str:
    """`text` with control characters as pictures (␀), direction overrides as ⟨U+202E⟩."""
    return text.translate(_TABLE)
