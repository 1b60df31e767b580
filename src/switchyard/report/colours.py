"""Colours of experts and of curves, the same on a light and on a dark page."""

import math

# of few: told apart by people with the common forms of colour blindness (after Okabe and Ito, 2008), and one more
FEW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#9467bd", "#a3a000")
GOLDEN = 137.50776  # degrees between the hues of two neighbours: any run of neighbours is far apart
LEVELS = ((0.66, 0.16), (0.76, 0.12), (0.56, 0.15))  # lightness and chroma in turn


def expert_colours(count: int) -> list[str]:
    """Returns one colour for each of `count` experts, as #rrggbb."""
    if count <= len(FEW):
        return list(FEW[:count])
    return [_hex(*LEVELS[index % len(LEVELS)], GOLDEN * index + 30.0) for index in range(count)]


def _hex(lightness: float, chroma: float, hue: float) -> str:
    """Converts OKLCH to sRGB (Ottosson, "A perceptual color space for image processing", 2020); clips what sRGB does
    not have."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(max(value, 0.0), 1.0))):02x}" for value in linear)


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
