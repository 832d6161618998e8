"""Fits to the runs of a sweep: isoFLOP optima, power laws with intervals, and L(N, D). Pure functions.

C training FLOPs, N parameters, D training tokens, L loss (bits per byte, or nats per token). K curves, R resamples.
The methods are approaches 2 and 3 of Hoffmann et al., arXiv 2203.15556. A replication (Besiroglu et al., arXiv
2404.10102) found that approach 3's optimizer had stopped before it converged, as its loss was an average of tiny
numbers; here the loss is a sum, in units of HUBER_DELTA.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dev.results import Run

INTERVAL_PCT = 95          # of every interval here
HUBER_DELTA = 1e-3         # log residuals beyond it count linearly: approach 3's choice
MIN_PARAMETRIC_RUNS = 8    # L(N, D) has five constants: with fewer runs it would fit anything
QUANTITIES = ("params", "tokens", "ratio", "loss")    # of an optimum


# ---------------------------------------------------------------------------------------------------------------------
# One budget: which model is best?


@dataclass(frozen=True)
class IsoFlop:
    """The runs of one FLOP budget, and the minimum of the parabola in ln N through their losses."""
    budget:       float
    params:       NDArray          # (runs,) ascending
    tokens:       NDArray          # (runs,)
    losses:       NDArray          # (runs,)
    coefficients: NDArray | None   # of the loss in ln N, highest power first; None when there are too few sizes
    best_params:  float = math.nan
    best_tokens:  float = math.nan
    best_loss:    float = math.nan
    note:         str = ""         # why there is no optimum

    @property
    def has_optimum(self) -> bool:
        return not self.note


def fit_isoflop(budget: float, params: NDArray, tokens: NDArray, losses: NDArray) -> IsoFlop:
    """One budget's parabola. An optimum beyond the trained sizes isn't extrapolated: then the note gives the reason.

    params, tokens, losses: (runs,) in any order; several runs of one size, such as several seeds, are welcome
    """
    order = np.argsort(params, kind="stable")
    params, tokens, losses = (np.asarray(values, dtype=float)[order] for values in (params, tokens, losses))
    num_sizes = len(np.unique(params))
    if num_sizes < 3:
        note = f"{num_sizes} model size{'s' * (num_sizes > 1)}, and a parabola needs three"
        return IsoFlop(budget, params, tokens, losses, None, note=note)
    log_params = np.log(params)
    coefficients = np.polyfit(log_params, losses, 2)
    best, note = -coefficients[1] / (2 * coefficients[0]), ""
    if coefficients[0] <= 0:
        note = "the losses have no minimum over the model size"
    elif best > log_params[-1]:
        note = f"the optimum lies beyond the largest model ({params[-1]:.3g} parameters); add larger ones"
    elif best < log_params[0]:
        note = f"the optimum lies below the smallest model ({params[0]:.3g} parameters); add smaller ones"
    if note:
        return IsoFlop(budget, params, tokens, losses, coefficients, note=note)
    # FLOPs per token aren't a fixed multiple of N, so D isn't C / 6N: it follows the runs, by the same kind of curve
    log_tokens = np.polyval(np.polyfit(log_params, np.log(tokens), 2), best)
    return IsoFlop(budget, params, tokens, losses, coefficients, math.exp(best), math.exp(log_tokens),
                   float(np.polyval(coefficients, best)))


@dataclass(frozen=True)
class Optima:
    """The best model of each of K budgets; a leading R means as many resamples."""
    params: NDArray    # (K,) or (R, K)
    tokens: NDArray
    loss:   NDArray

    @property
    def ratio(self) -> NDArray:
        """Tokens per parameter."""
        return self.tokens / self.params


def collect_optima(curves: list[IsoFlop]) -> Optima:
    """The optima of the curves that have one."""
    best = [(c.best_params, c.best_tokens, c.best_loss) for c in curves if c.has_optimum]
    return Optima(*np.array(best).reshape(-1, 3).T)


def draw_noise(residuals: list[NDArray], freedom: int, num_resamples: int, seed: int) -> list[NDArray]:
    """(R, runs) of noise for each fit's residuals: a parametric bootstrap.

    The noise's deviation is estimated from all residuals together, and drawn too, since few runs leave it uncertain.
    """
    rng = np.random.default_rng(seed)
    squares = sum(float((values**2).sum()) for values in residuals)
    deviations = np.sqrt(squares / rng.chisquare(freedom, (num_resamples, 1)))
    return [deviations * rng.standard_normal((num_resamples, len(values))) for values in residuals]


def resample_optima(curves: list[IsoFlop], num_resamples: int = 2000, seed: int = 0) -> Optima | None:
    """The optima under other draws of the noise, (R, K); None where no curve has residuals that tell its size.

    A curve through three sizes has no residuals: its noise is that of the others.
    """
    curves = [curve for curve in curves if curve.has_optimum]
    fitted = [np.polyval(curve.coefficients, np.log(curve.params)) for curve in curves]
    freedom = sum(len(curve.params) - 3 for curve in curves)
    if freedom < 1:
        return None
    noise = draw_noise([curve.losses - fit for curve, fit in zip(curves, fitted, strict=True)], freedom, num_resamples,
                       seed)
    best = []
    for curve, fit, errors in zip(curves, fitted, noise, strict=True):
        center = np.log(curve.params).mean()
        powers = np.vander(np.log(curve.params) - center, 3)                   # (runs, 3)
        solve = np.linalg.pinv(powers).T                                       # (runs, 3): values @ solve = a parabola
        a, b, c = ((fit + errors) @ solve).T                                   # (R,) each
        a = np.where(a > 0, a, np.nan)        # a draw without a minimum has no optimum, and leaves the percentiles
        x = np.clip(-b / (2 * a), -10, 10)    # a nearly flat one has it anywhere; e^10 is far enough
        log_tokens = np.polyval(np.log(curve.tokens) @ solve, x)
        best.append((np.exp(x + center), np.exp(log_tokens), (a * x + b) * x + c))
    return Optima(*np.array(best).transpose(1, 2, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Over the budgets: power laws


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x^exponent."""
    exponent:    float
    coefficient: float
    r2:          float                       # of the line in log-log; nan through two points, which any line fits
    interval:    tuple[float, float] | None  # of the exponent; None where nothing tells the noise

    def predict(self, x: NDArray | float) -> NDArray | float:
        return self.coefficient * np.power(x, self.exponent)


def fit_power_law(x: NDArray, y: NDArray, resampled: NDArray | None = None) -> PowerLaw | None:
    """A least-squares line in log-log through (K,) points; None for fewer than two different x.

    resampled: (R, K) other draws of y, for the exponent's interval
    """
    if len(np.unique(x)) < 2:
        return None
    log_x, log_y = np.log(x), np.log(y)
    slope, intercept = np.polyfit(log_x, log_y, 1)
    residuals = log_y - (intercept + slope * log_x)
    variance = float(((log_y - log_y.mean()) ** 2).sum())
    r2 = 1 - float((residuals**2).sum()) / variance if len(x) > 2 and variance > 0 else math.nan
    interval = None
    if resampled is not None:
        centered = log_x - log_x.mean()
        with np.errstate(invalid="ignore"):    # a draw without a value, or with one below zero, has no logarithm
            interval = get_interval(np.log(resampled) @ centered / (centered @ centered))
    return PowerLaw(float(slope), math.exp(intercept), r2, interval)


def get_interval(values: NDArray) -> tuple[float, float] | None:
    """The middle INTERVAL_PCT of the draws; None where most draws gave no value."""
    values = values[np.isfinite(values)] if np.isfinite(values).mean() > 0.5 else values[:0]
    tail = (100 - INTERVAL_PCT) / 2
    return tuple(float(v) for v in np.percentile(values, (tail, 100 - tail))) if len(values) else None


@dataclass(frozen=True)
class Law:
    """The optima of a sweep and the power laws through them, with parameters counted in one way."""
    curves:  list[IsoFlop]
    budgets: NDArray                       # (K,) those with an optimum
    optima:  Optima
    ratios:  list[tuple | None]            # (K,) intervals of the tokens per parameter
    fits:    dict[str, PowerLaw | None]    # of each of QUANTITIES against FLOPs


def fit_law(budgets: dict[float, list[Run]], convention: str) -> Law:
    """The curves of all budgets with parameters counted by `convention`, and the power laws through their optima."""
    curves = [fit_isoflop(budget, *np.array([(r.params[convention], r.tokens, r.loss) for r in runs]).T)
              for budget, runs in budgets.items()]
    optima, draws = collect_optima(curves), resample_optima(curves)
    flops = np.array([curve.budget for curve in curves if curve.has_optimum])
    fits = {key: fit_power_law(flops, getattr(optima, key), draws and getattr(draws, key)) for key in QUANTITIES}
    return Law(curves, flops, optima, [draws and get_interval(draws.ratio[:, k]) for k in range(len(flops))], fits)


# ---------------------------------------------------------------------------------------------------------------------
# All runs at once: L(N, D)


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta."""
    E:         float
    A:         float
    B:         float
    alpha:     float
    beta:      float
    error_pct: float   # root mean square of the residuals, in percent of the loss

    def predict(self, params: NDArray | float, tokens: NDArray | float) -> NDArray | float:
        return self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)

    def get_exponents(self) -> tuple[float, float]:
        """(a, b) of the optimum's N ~ C^a and D ~ C^b, where C is proportional to N * D."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total

    def get_optimum(self, flops: NDArray | float, flops_per_param_token: float = 6.0) -> tuple:
        """(N, D) of the lowest loss among all with N * D * flops_per_param_token = flops."""
        a, b = self.get_exponents()
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        product = flops / flops_per_param_token
        return G * np.power(product, a), np.power(product, b) / G


def fit_parametric(params: NDArray, tokens: NDArray, losses: NDArray) -> ParametricLaw | None:
    """Approach 3: Huber loss on log residuals, L-BFGS from a grid of starts; None for too few or too similar runs."""
    if len(losses) < MIN_PARAMETRIC_RUNS or len(np.unique(params)) < 3 or len(np.unique(tokens)) < 3:
        return None
    # with centered logarithms the constants A and B hardly depend on the exponents, which eases the descent
    centers = np.log(params).mean(), np.log(tokens).mean()
    data = [torch.as_tensor(np.log(params) - centers[0]), torch.as_tensor(np.log(tokens) - centers[1]),
            torch.as_tensor(np.log(losses))]
    starts = [make_start(data, alpha, beta) for alpha in (0.1, 0.35, 0.8) for beta in (0.1, 0.35, 0.8)]
    theta = min((minimize(start, data) for start in starts), key=lambda theta: float(measure_misfit(theta, data)))
    log_E, log_A, log_B, alpha, beta = theta.tolist()
    error = float((predict_log_loss(theta, data) - data[2]).square().mean().sqrt())
    if min(alpha, beta) < 1e-3:    # a term that doesn't fall is a second E
        return None
    return ParametricLaw(math.exp(log_E), math.exp(log_A + alpha * centers[0]), math.exp(log_B + beta * centers[1]),
                         alpha, beta, 100 * error)


def make_start(data: list[torch.Tensor], alpha: float, beta: float) -> torch.Tensor:
    """(5,) log E, log A, log B, alpha, beta: least squares gives the constants for these exponents."""
    log_params, log_tokens, log_losses = data
    columns = torch.stack([torch.ones_like(log_params), (-alpha * log_params).exp(), (-beta * log_tokens).exp()], 1)
    losses = log_losses.exp()
    constants = torch.linalg.lstsq(columns, losses[:, None]).solution[:, 0]
    floor = 1e-2 * float(losses.min())    # wrong exponents may fit negative constants, which have no logarithm
    return torch.cat([constants.clamp_min(floor).log(), torch.tensor([alpha, beta], dtype=losses.dtype)])


def predict_log_loss(theta: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """(runs,) ln L(N, D)."""
    log_E, log_A, log_B, alpha, beta = theta
    log_params, log_tokens, _ = data
    terms = torch.stack([log_E.expand_as(log_params), log_A - alpha * log_params, log_B - beta * log_tokens])
    return terms.logsumexp(0)


def measure_misfit(theta: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """Huber loss of the log residuals in units of HUBER_DELTA, to match the optimizer's tolerances."""
    residuals = (predict_log_loss(theta, data) - data[2]) / HUBER_DELTA
    return torch.nn.functional.huber_loss(residuals, torch.zeros_like(residuals), reduction="sum")


def minimize(start: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """The best theta near `start`."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=400, max_eval=800, tolerance_grad=1e-9, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        misfit = measure_misfit(theta, data)
        misfit.backward()
        return misfit
    optimizer.step(closure)
    return theta.detach()
