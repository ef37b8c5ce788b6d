"""Elementary functions of the kernels in float32: sine and cosine, e^x - 1, and powers of two.

The library's own sine takes memory for angles that nothing here has, its e^x - 1 is not in the language, and its powers
of two are off by two units in the last place. These keep to registers and are within one unit or so.
"""

from soflow_kernels._dispatch import jit, tl


@jit
def sincos(angle):
    """(sin, cos) of an angle in radians, within 1.1e-7 for |angle| up to 12 800.

    pi/2 is taken in three parts (Cody & Waite 1980); the products of the first two with a whole number k are exact as
    long as k has 13 bits. From 1e6 or so on float32 holds no angle: the results stay in [-1, 1], and NaN stays NaN.
    """
    k = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi/2 = 201 2^-7 + 2029 2^-22 + the rest
    r = angle - k * 1.5703125 - k * 0.00048375129699707031 - k * 7.549789948768648e-08
    r = tl.where(tl.abs(r) > 1, 0.0, r)
    return _turned(r, k)


@jit
def sincos_of_quarters(quarters):
    """(sin, cos) of pi/2 times the argument. The reduction is exact, so that whole arguments give exact 0 and 1."""
    k = tl.floor(quarters + 0.5)
    return _turned((quarters - k) * 1.5707963267948966, k)


@jit
def _turned(r, k):
    """(sin, cos) of r + k pi/2, for r in [-pi/4, pi/4] and a whole k: Taylor polynomials."""
    y = r * r
    sin = r + r * (y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cos = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    half = tl.floor(0.5 * k)
    odd = k - 2 * half > 0.5
    sign = 1 - 2 * (half - 2 * tl.floor(0.5 * half))  # -1 in the quadrants 2 and 3
    return sign * tl.where(odd, cos, sin), sign * tl.where(odd, -sin, cos)


@jit
def expm1(x):
    """e^x - 1 for |x| <= 1/2, relative to itself: its series to the ninth power, one operation for each."""
    poly = 1 / 40320 + x * (1 / 362880)
    poly = 1 / 720 + x * (1 / 5040 + x * poly)
    poly = 1 / 24 + x * (1 / 120 + x * poly)
    poly = 1 / 2 + x * (1 / 6 + x * poly)
    return x + x * x * poly


@jit
def exp2(x, rest):
    """2^(x + rest) within one unit, where it is a normal number; |rest| is small, what x lacks of an exact exponent."""
    n = -tl.floor(0.5 - x)
    r = (x - n) + rest  # in [-0.51, 0.51]: 2^r by the series of exp(r ln 2)
    poly = 1.5252733804059840e-05 + r * 1.3215486790144307e-06
    poly = 1.5403530393381610e-04 + r * poly
    poly = 1.3333558146428443e-03 + r * poly
    poly = 9.6181291076284770e-03 + r * poly
    poly = 5.5504108664821580e-02 + r * poly
    poly = 2.4022650695910072e-01 + r * poly
    poly = 6.9314718055994530e-01 + r * poly
    return (1 + r * poly) * ((127 + n.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
