"""Options of a network that cannot be, refused in one line that has those that can."""


def nearest(length: int, stride: int) -> str:
    """The one or two multiples of `stride` around `length` pixels, in words."""
    below = length // stride * stride
    if below == length:
        return f"{below}"
    return f"{below} and {below + stride}" if below > 0 else f"{stride}"


def check_img_size(height: int, width: int, stride: int) -> None:
    """Raise ValueError unless both sides, in pixels, are multiples of `stride`."""
    if height < stride or width < stride or height % stride or width % stride:
        raise ValueError(
            f"img_size=({height}, {width}) does not divide into {stride} x {stride} pixels, the patch and its "
            f"mergings: the nearest heights are {nearest(height, stride)}, the nearest widths {nearest(width, stride)}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value`, of the option `name`, is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: give one of {', '.join(map(repr, choices))}")
