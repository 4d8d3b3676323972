"""Distillation methods by name; "a+b" is the sum of two."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lakd_jax import fields
from lakd_jax.distill import (
    ab,
    afd,
    at,
    catkd,
    cc,
    cd,
    crd,
    ctkd,
    dist,
    dkd,
    fam,
    fitnet,
    fsp,
    ft,
    kd,
    kdpp,
    kdsvd,
    lakd,
    mlkd,
    nkd,
    nst,
    ofd,
    pkt,
    review,
    rkd,
    rtk,
    sdd,
    sp,
    vid,
    wttm,
)
from lakd_jax.distill.base import method, term

METHODS: dict[str, type[method.Method]] = {
    "none": kd.Plain,
    "kd": kd.KD,
    "lakd": lakd.LAKD,
    "afd": afd.AFD,
    "rtk": rtk.RTK,
    "dkd": dkd.DKD,
    "at": at.AT,
    "sp": sp.SP,
    "dist": dist.DIST,
    "nkd": nkd.NKD,
    "ttm": wttm.TTM,
    "wttm": wttm.WTTM,
    "ctkd": ctkd.CTKD,
    "mlkd": mlkd.MLKD,
    "sdd": sdd.SDD,
    "rkd": rkd.RKD,
    "pkt": pkt.PKT,
    "nst": nst.NST,
    "cc": cc.CC,
    "vid": vid.VID,
    "fitnet": fitnet.FitNet,
    "kdsvd": kdsvd.KDSVD,
    "ab": ab.AB,
    "fsp": fsp.FSP,
    "ft": ft.FT,
    "catkd": catkd.CATKD,
    "kdpp": kdpp.KDPP,
    "fam": fam.FAM,
    "cd": cd.CD,
    "crd": crd.CRD,
    "ofd": ofd.OFD,
    "review": review.Review,
}
TITLES = {  # where they are not the name in capital letters
    "none": "alone",
    "fitnet": "FitNet",
    "rtk": "RTK (our reading)",
    "mlkd": "MLKD (one view)",
    "catkd": "CAT-KD",
    "kdpp": "KD++",
    "fam": "FAM-KD",
    "review": "ReviewKD",
}

# The methods whose options are an object of their own.
_OPTIONS: dict[str, Any] = {"lakd": lakd.Options, "rtk": rtk.Options}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run has to know of its method; see `method.Method` for each."""

    local: bool
    staged: bool
    cut_scale: float
    needs_teacher: bool
    needs_heads: bool
    needs_preacts: bool
    least_batch: int
    teacher_reads: tuple[str, ...]


def names() -> list[str]:
    """All methods; `none` is plain training without a teacher."""
    return list(METHODS)


def parts(name: str) -> tuple[str, ...]:
    """The methods of a sum, "dkd+at" -> ("dkd", "at"); of a lone one, itself.

    Raises:
      ValueError: an unknown method, with the nearest name; one that is named twice;
        `none` in a sum.
    """
    found = tuple(name.split("+"))
    for one in found:
        fields.check("method", one, names())
    if len(found) > 1 and "none" in found:
        raise ValueError(f"method {name!r}: none has nothing to add to a sum")
    if again := [one for one in found if found.count(one) > 1]:
        raise ValueError(f"method {name!r} names {again[0]} twice")
    return found


def facts(name: str) -> Facts:
    """Of a method or a sum; ValueError as `parts`."""
    found = [METHODS[one] for one in parts(name)]
    reads = dict.fromkeys(part for one in found for part in one.teacher_reads)
    return Facts(
        local=len(found) == 1 and found[0].local,
        staged=any(one.staged for one in found),
        cut_scale=min(one.cut_scale for one in found),
        needs_teacher=any(one.needs_teacher for one in found),
        needs_heads=any(one.needs_heads for one in found),
        needs_preacts=any(one.needs_preacts for one in found),
        least_batch=max(one.least_batch for one in found),
        teacher_reads=tuple(reads),
    )


def title(name: str) -> str:
    """What tables call a method or a sum; ValueError as `parts`."""
    return " + ".join(TITLES.get(one, one.upper()) for one in parts(name))


def option_names(name: str) -> list[str]:
    """The options that `create` takes for a method.

    Raises ValueError for an unknown method, with the nearest name.
    """
    fields.check("method", name, names())
    owner = _OPTIONS.get(name, METHODS[name])
    own = [f.name for f in dataclasses.fields(owner)]
    return [n for n in own if n not in ("parent", "name")]


def create(name: str, options: Mapping[str, Any]) -> method.Method:
    """The method `name`; its parameters come from `init` with `Signals`.

    Args:
      name: one of `names()`.
      options: by the names of `option_names(name)`; LAKD's may be left out, where
        `lakd.Options` has defaults.

    Raises:
      ValueError: unknown method or option, or a value that is not allowed.
      TypeError: an option of a method other than LAKD is missing.
    """
    fields.check("method", name, names())
    for option in options:
        fields.check(f"an option of method {name}", option, option_names(name))
    make: Any = METHODS[name]
    if name in _OPTIONS:
        return make(_OPTIONS[name](**options))
    return make(**options)


def create_sum(options: Mapping[str, Mapping[str, Any]]) -> method.Method:
    """All of these methods at once, by name the options that `create` takes."""
    return term.Sum(tuple(create(name, own) for name, own in options.items()))
