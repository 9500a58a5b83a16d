"""Worked mathematics problems in LaTeX: a generator without end, the same for the same seed."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import count
from math import comb, gcd
from random import Random

Number = int | Fraction
Problem = tuple[str, list[str], str]  # question, steps of the solution, answer


def worksheets(seed: str, problems: tuple[int, int] = (3, 8)) -> Iterator[str]:
    """Yield endless worksheets; another ``seed`` gives other ones. Worksheet i depends on nothing but the seed and i.

    Args:
        seed: any text; train and validation take different ones.
        problems: the least and the largest number of problems of a sheet.

    Example:
        >>> print(next(worksheets("doctest", problems=(1, 1))))  # doctest: +ELLIPSIS
        \\section*{...}
        <BLANKLINE>
        \\textbf{Problem 1.} ...
    """
    for index in count():
        random = Random(f"{seed}/{index}")
        topic, writers = random.choice(TOPICS)
        lines = [f"\\section*{{{topic}}}"]
        for number in range(1, random.randint(*problems) + 1):
            question, steps, answer = random.choice(writers)(random)
            lines.append(f"\\textbf{{Problem {number}.}} {question}")
            lines.append(f"\\textit{{Solution.}} {' '.join(steps)} {random.choice(CLOSINGS)} $\\boxed{{{answer}}}$.")
        yield "\n\n".join(lines) + "\n"


CLOSINGS = ("The answer is", "Therefore we get", "Hence the result is", "We conclude with", "So the solution is")


def linear_equation(random: Random) -> Problem:
    x, a, c = _nonzero(random, 20), _nonzero(random, 15), _nonzero(random, 9)
    c = c if c != a else c + a
    b = random.randint(-60, 60)
    d = (a - c) * x + b
    left, right = _polynomial([b, a]), _polynomial([d, c])
    return (
        f"Solve the equation ${left} = {right}$ for $x$.",
        [
            f"Subtract ${_polynomial([0, c])}$ from both sides: ${_polynomial([b, a - c])} = {d}$.",
            f"Move the constant to the right: ${_polynomial([0, a - c])} = {d - b}$.",
            f"Divide by ${a - c}$ to find $x = {x}$.",
        ],
        f"x = {x}",
    )


def quadratic_equation(random: Random) -> Problem:
    p, q, a = random.randint(-40, 40), random.randint(-40, 40), random.randint(1, 9)
    b, c = -a * (p + q), a * p * q
    discriminant = b * b - 4 * a * c
    roots = f"x \\in \\{{{min(p, q)}, {max(p, q)}\\}}" if p != q else f"x = {p}"
    return (
        f"Find all real roots of ${_polynomial([c, b, a])} = 0$.",
        [
            f"The discriminant is $\\Delta = b^2 - 4ac = {b * b} - 4 \\cdot {a} \\cdot {_paren(c)} = {discriminant}$.",
            f"Its square root is ${a * abs(p - q)}$,"
            f" so $x = \\frac{{-b \\pm \\sqrt{{\\Delta}}}}{{2a}} = \\frac{{{-b} \\pm {a * abs(p - q)}}}{{{2 * a}}}$.",
            f"This gives $x_1 = {max(p, q)}$ and $x_2 = {min(p, q)}$.",
        ],
        roots,
    )


def linear_system(random: Random) -> Problem:
    x, y = random.randint(-12, 12), random.randint(-12, 12)
    a, b, c, d = (_nonzero(random, 9) for _ in range(4))
    d = d if a * d != b * c else d + (1 if d != -1 else 2)
    determinant, e, f = a * d - b * c, a * x + b * y, c * x + d * y
    return (
        "Solve the system $$\\begin{cases} "
        f"{_terms([(a, 'x'), (b, 'y')])} = {e} \\\\ {_terms([(c, 'x'), (d, 'y')])} = {f} \\end{{cases}}$$",
        [
            "By Cramer's rule the determinant is"
            f" $D = {a} \\cdot {_paren(d)} - {_paren(b)} \\cdot {_paren(c)} = {determinant}$.",
            f"Then $D_x = {e} \\cdot {_paren(d)} - {_paren(b)} \\cdot {_paren(f)} = {e * d - b * f}$"
            f" and $D_y = {a} \\cdot {_paren(f)} - {_paren(e)} \\cdot {_paren(c)} = {a * f - e * c}$.",
            f"Dividing, $x = D_x / D = {x}$ and $y = D_y / D = {y}$.",
        ],
        f"(x, y) = ({x}, {y})",
    )


def derivative(random: Random) -> Problem:
    coefficients = _coefficients(random, degree=random.randint(2, 5))
    slopes = _derived(coefficients)
    at = random.randint(-4, 4)
    value = _evaluate(slopes, at)
    rules = ", ".join(
        f"$\\frac{{d}}{{dx}}\\left({_polynomial(_monomial(k, c))}\\right) = {_polynomial(_monomial(k - 1, k * c))}$"
        for k, c in enumerate(coefficients)
        if k and c
    )
    return (
        f"Let $f(x) = {_polynomial(coefficients)}$. Compute $f'({at})$.",
        [
            f"Differentiate term by term with the power rule: {rules}.",
            f"So $f'(x) = {_polynomial(slopes)}$, and substituting $x = {at}$ gives $f'({at}) = {value}$.",
        ],
        str(value),
    )


def definite_integral(random: Random) -> Problem:
    coefficients = _coefficients(random, degree=random.randint(1, 3))
    low = random.randint(-4, 3)
    high = random.randint(low + 1, 5)
    primitive = [Fraction(0), *(Fraction(c, k + 1) for k, c in enumerate(coefficients))]
    upper, lower = _evaluate(primitive, high), _evaluate(primitive, low)
    return (
        f"Evaluate $\\int_{{{low}}}^{{{high}}} \\left({_polynomial(coefficients)}\\right) dx$.",
        [
            f"An antiderivative is $F(x) = {_polynomial(primitive)}$.",
            f"At the limits, $F({high}) = {_number(upper)}$ and $F({low}) = {_number(lower)}$.",
            "By the fundamental theorem of calculus the integral equals"
            f" $F({high}) - F({low}) = {_number(upper - lower)}$.",
        ],
        _number(upper - lower),
    )


def tangent_line(random: Random) -> Problem:
    coefficients = _coefficients(random, degree=random.randint(2, 3))
    at = random.randint(-5, 5)
    value, slope = _evaluate(coefficients, at), _evaluate(_derived(coefficients), at)
    line = _polynomial([value - slope * at, slope])
    return (
        f"Find the tangent to the curve $y = {_polynomial(coefficients)}$ at the point where $x = {at}$.",
        [
            f"The point on the curve is $({at}, {value})$.",
            f"The derivative is $y' = {_polynomial(_derived(coefficients))}$, so the slope there is $m = {slope}$.",
            f"The line $y - {_paren(value)} = {slope}(x - {_paren(at)})$ simplifies to $y = {line}$.",
        ],
        f"y = {line}",
    )


def greatest_common_divisor(random: Random) -> Problem:
    factor = random.randint(2, 40)
    a, b = factor * random.randint(10, 200), factor * random.randint(3, 90)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"${x} = {x // y} \\cdot {y} + {x % y}$.")
        x, y = y, x % y
    return (
        f"Use the Euclidean algorithm to compute $\\gcd({a}, {b})$ and $\\operatorname{{lcm}}({a}, {b})$.",
        [
            *steps,
            f"The last nonzero remainder is ${x}$.",
            f"Since $\\gcd \\cdot \\operatorname{{lcm}} = {a} \\cdot {b} = {a * b}$,"
            f" the least common multiple is ${a * b // x}$.",
        ],
        f"\\gcd = {x}, \\quad \\operatorname{{lcm}} = {a * b // x}",
    )


def modular_power(random: Random) -> Problem:
    base, exponent, modulus = random.randint(2, 60), random.randint(9, 99), random.randint(11, 199)
    steps, square = [], base % modulus
    for bit in range(exponent.bit_length()):
        steps.append(f"${base}^{{{2**bit}}} \\equiv {square} \\pmod{{{modulus}}}$.")
        square = square * square % modulus
    bits = " + ".join(str(2**bit) for bit in range(exponent.bit_length()) if exponent >> bit & 1)
    answer = pow(base, exponent, modulus)
    return (
        f"Find the remainder of ${base}^{{{exponent}}}$ on division by ${modulus}$.",
        [
            "Square repeatedly:",
            *steps,
            f"Since ${exponent} = {bits}$, multiplying these powers gives ${base}^{{{exponent}}}"
            f" \\equiv {answer} \\pmod{{{modulus}}}$.",
        ],
        str(answer),
    )


def fraction_sum(random: Random) -> Problem:
    (a, b), (c, d) = ((random.randint(1, 60), random.randint(2, 60)) for _ in range(2))
    sign = random.choice("+-")
    common = b * d // gcd(b, d)
    left, right = a * common // b, c * common // d
    total = left + right if sign == "+" else left - right
    answer = _number(Fraction(total, common))
    return (
        f"Compute $\\frac{{{a}}}{{{b}}} {sign} \\frac{{{c}}}{{{d}}}$ and simplify.",
        [
            f"The least common denominator of ${b}$ and ${d}$ is ${common}$.",
            f"Rewriting, $\\frac{{{left}}}{{{common}}} {sign} \\frac{{{right}}}{{{common}}}"
            f" = \\frac{{{total}}}{{{common}}}$.",
            f"In lowest terms this is ${answer}$.",
        ],
        answer,
    )


def matrix_product(random: Random) -> Problem:
    A, B = ([[random.randint(-9, 9) for _ in range(2)] for _ in range(2)] for _ in range(2))
    C = [[sum(A[i][k] * B[k][j] for k in range(2)) for j in range(2)] for i in range(2)]
    steps = [
        f"Entry $({i + 1},{j + 1})$ is ${A[i][0]} \\cdot {_paren(B[0][j])} + {_paren(A[i][1])} \\cdot {_paren(B[1][j])}"
        f" = {C[i][j]}$."
        for i in range(2)
        for j in range(2)
    ]
    return f"Compute the product $AB$ for $A = {_matrix(A)}$ and $B = {_matrix(B)}$.", steps, f"AB = {_matrix(C)}"


def determinant(random: Random) -> Problem:
    M = [[random.randint(-7, 7) for _ in range(3)] for _ in range(3)]
    (a, b, c), *below = M
    minors = [below[0][j] * below[1][k] - below[0][k] * below[1][j] for j, k in ((1, 2), (0, 2), (0, 1))]
    value = a * minors[0] - b * minors[1] + c * minors[2]
    return (
        f"Evaluate $\\det {_matrix(M)}$.",
        [
            f"Expand along the first row. The minors are $M_{{11}} = {minors[0]}$, $M_{{12}} = {minors[1]}$ and"
            f" $M_{{13}} = {minors[2]}$.",
            f"With alternating signs, $\\det = {a} \\cdot {_paren(minors[0])} - {_paren(b)} \\cdot {_paren(minors[1])}"
            f" + {_paren(c)} \\cdot {_paren(minors[2])} = {value}$.",
        ],
        str(value),
    )


def arithmetic_series(random: Random) -> Problem:
    first, step, n = random.randint(-90, 200), _nonzero(random, 25), random.randint(8, 80)
    last = first + (n - 1) * step
    total = n * (first + last) // 2
    return (
        f"Find the sum of the first ${n}$ terms of the arithmetic sequence with $a_1 = {first}$ and"
        f" common difference $d = {step}$.",
        [
            f"The last term is $a_{{{n}}} = a_1 + (n-1)d = {first} + {n - 1} \\cdot {_paren(step)} = {last}$.",
            "The sum is"
            f" $S_n = \\frac{{n}}{{2}}(a_1 + a_n) = \\frac{{{n}}}{{2}} \\cdot {_paren(first + last)} = {total}$.",
        ],
        str(total),
    )


def geometric_series(random: Random) -> Problem:
    first, n = random.randint(1, 900), random.randint(3, 8)
    ratio = random.choice([Fraction(2), Fraction(3), Fraction(-2), Fraction(1, 2), Fraction(2, 3), Fraction(-1, 3)])
    total = first * (1 - ratio**n) / (1 - ratio)
    terms = ", ".join(_number(first * ratio**k) for k in range(n))
    return (
        f"A geometric sequence has first term ${first}$ and ratio ${_number(ratio)}$."
        f" Find the sum of its first ${n}$ terms.",
        [
            f"The terms are ${terms}$.",
            f"The formula $S_n = a_1 \\frac{{1 - r^n}}{{1 - r}}$ gives $S_{{{n}}} = {_number(total)}$.",
        ],
        _number(total),
    )


def hypergeometric(random: Random) -> Problem:
    red, blue, drawn = random.randint(5, 60), random.randint(5, 60), random.randint(2, 5)
    wanted = random.randint(1, min(red, drawn))
    ways, total = comb(red, wanted) * comb(blue, drawn - wanted), comb(red + blue, drawn)
    answer = _number(Fraction(ways, total))
    return (
        f"An urn holds ${red}$ red and ${blue}$ blue balls. We draw ${drawn}$ without replacement."
        f" What is the probability of exactly ${wanted}$ red?",
        [
            f"There are $\\binom{{{red + blue}}}{{{drawn}}} = {total}$ equally likely draws.",
            f"Favourable are $\\binom{{{red}}}{{{wanted}}} \\binom{{{blue}}}{{{drawn - wanted}}} = {ways}$.",
            f"The ratio is $P = \\frac{{{ways}}}{{{total}}} = {answer}$.",
        ],
        answer,
    )


def expected_value(random: Random) -> Problem:
    weights = [random.randint(1, 9) for _ in range(random.randint(3, 5))]
    values = sorted(random.sample(range(-10, 30), len(weights)))
    total = sum(weights)
    mean = Fraction(sum(w * v for w, v in zip(weights, values, strict=True)), total)
    square = Fraction(sum(w * v * v for w, v in zip(weights, values, strict=True)), total)
    table = ", ".join(f"P(X = {v}) = \\frac{{{w}}}{{{total}}}" for w, v in zip(weights, values, strict=True))
    return (
        f"A random variable satisfies ${table}$. Find its mean and variance.",
        [
            f"The mean is $E[X] = \\sum_x x P(X = x) = {_number(mean)}$.",
            f"Likewise $E[X^2] = {_number(square)}$.",
            f"So $\\operatorname{{Var}}(X) = E[X^2] - E[X]^2 = {_number(square - mean**2)}$.",
        ],
        f"E[X] = {_number(mean)}, \\quad \\operatorname{{Var}}(X) = {_number(square - mean**2)}",
    )


def right_triangle(random: Random) -> Problem:
    p, q, k = random.randint(2, 30), random.randint(1, 29), random.randint(1, 12)
    p, q = max(p, q + 1), min(p, q)
    a, b, c = k * (p * p - q * q), 2 * k * p * q, k * (p * p + q * q)
    return (
        f"A right triangle has hypotenuse ${c}$ and one leg ${a}$. Find the other leg and the area.",
        [
            f"By the Pythagorean theorem $b^2 = c^2 - a^2 = {c * c} - {a * a} = {b * b}$, so $b = {b}$.",
            "The area is"
            f" $\\frac{{1}}{{2}} a b = \\frac{{1}}{{2}} \\cdot {a} \\cdot {b} = {_number(Fraction(a * b, 2))}$.",
        ],
        f"b = {b}, \\quad A = {_number(Fraction(a * b, 2))}",
    )


def circle_equation(random: Random) -> Problem:
    h, k, r = random.randint(-30, 30), random.randint(-30, 30), random.randint(1, 30)
    constant = h * h + k * k - r * r
    return (
        f"Find the centre and radius of the circle"
        f" ${_terms([(1, 'x^2'), (1, 'y^2'), (-2 * h, 'x'), (-2 * k, 'y'), (constant, '')])} = 0$.",
        [
            f"Complete the squares: $(x - {_paren(h)})^2 + (y - {_paren(k)})^2"
            f" = {h * h} + {k * k} - {_paren(constant)} = {r * r}$.",
            f"The centre is $({h}, {k})$ and the radius is $\\sqrt{{{r * r}}} = {r}$.",
        ],
        f"({h}, {k}), \\; r = {r}",
    )


TOPICS: tuple[tuple[str, tuple[Callable[[Random], Problem], ...]], ...] = (
    ("Equations", (linear_equation, quadratic_equation, linear_system)),
    ("Calculus", (derivative, definite_integral, tangent_line)),
    ("Number theory", (greatest_common_divisor, modular_power, fraction_sum)),
    ("Linear algebra", (matrix_product, determinant, linear_system)),
    ("Sequences and series", (arithmetic_series, geometric_series)),
    ("Probability", (hypergeometric, expected_value)),
    ("Geometry", (right_triangle, circle_equation)),
)


def _nonzero(random: Random, bound: int) -> int:
    return random.choice((-1, 1)) * random.randint(1, bound)


def _coefficients(random: Random, degree: int) -> list[int]:
    """Return coefficients, the lowest power first, the highest one not 0."""
    return [random.randint(-9, 9) for _ in range(degree)] + [_nonzero(random, 9)]


def _derived(coefficients: list[int]) -> list[int]:
    return [k * c for k, c in enumerate(coefficients)][1:]


def _monomial(power: int, coefficient: int) -> list[int]:
    return [0] * power + [coefficient]


def _evaluate(coefficients: Sequence[Number], x: int) -> Number:
    return sum(c * x**k for k, c in enumerate(coefficients))


def _number(value: Number) -> str:
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _paren(value: Number) -> str:
    return f"({value})" if value < 0 else str(value)


def _terms(terms: Sequence[tuple[Number, str]]) -> str:
    """Return a sum as text: ``[(2, "x"), (-1, "y")]`` -> ``2x - y``."""
    written = ""
    for coefficient, symbol in terms:
        if coefficient == 0:
            continue
        size = "" if symbol and abs(coefficient) == 1 else _number(abs(Fraction(coefficient)))
        sign = ("-" if coefficient < 0 else "") if not written else (" - " if coefficient < 0 else " + ")
        written += f"{sign}{size}{symbol}"
    return written or "0"


def _polynomial(coefficients: Sequence[Number]) -> str:
    """Return a polynomial as text, the highest power first, from coefficients with the lowest first."""
    powers = [{0: "", 1: "x"}.get(power, f"x^{power}") for power in range(len(coefficients))]
    return _terms([*zip(coefficients, powers, strict=True)][::-1])


def _matrix(rows: list[list[int]]) -> str:
    return "\\begin{pmatrix} " + " \\\\ ".join(" & ".join(map(str, row)) for row in rows) + " \\end{pmatrix}"
