"""Scaling laws from the runs of a sweep: isoFLOP optima, power laws with intervals, and L(N, D). Pure functions.

C training FLOPs, N parameters, D training tokens, L loss (bits per byte, or nats per token). K curves, R resamples.
The methods are approaches 2 and 3 of Hoffmann et al., arXiv 2203.15556. As a replication found (Besiroglu et al., arXiv
2404.10102), approach 3 is easily stopped before it has converged: its loss is a sum here, in units that aren't tiny.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

INTERVAL_PCT = 95          # of every interval here
HUBER_DELTA = 1e-3         # log residuals beyond it count linearly: approach 3's choice
MIN_PARAMETRIC_RUNS = 8    # five constants are fitted; fewer runs would fit anything


# ---------------------------------------------------------------------------------------------------------------------
# One budget: which model is best?


@dataclass(frozen=True)
class IsoFlop:
    """The runs of one FLOP budget, and the bottom of the parabola in ln N through their losses."""
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
    """Fit one budget's parabola. An optimum outside the sizes that were trained is not extrapolated: the note says so.

    params, tokens, losses: (runs,) in any order; several runs of one size, as from several seeds, are welcome
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
    # FLOPs per token are no fixed multiple of N, so D is read off the runs, by the same kind of curve, not from C / 6N
    log_tokens = np.polyval(np.polyfit(log_params, np.log(tokens), 2), best)
    return IsoFlop(budget, params, tokens, losses, coefficients, math.exp(best), math.exp(log_tokens),
                   float(np.polyval(coefficients, best)))


@dataclass(frozen=True)
class Optima:
    """The best model of each of K budgets; a leading R means as many resamples of the same."""
    params: NDArray    # (K,) or (R, K)
    tokens: NDArray
    losses: NDArray


def collect_optima(curves: list[IsoFlop]) -> Optima:
    """What was fitted, without the curves that have no optimum."""
    best = [(c.best_params, c.best_tokens, c.best_loss) for c in curves if c.has_optimum]
    return Optima(*np.array(best).reshape(-1, 3).T)


def resample_optima(curves: list[IsoFlop], num_resamples: int = 2000, seed: int = 0) -> Optima | None:
    """The optima that other draws of the noise would have given, (R, K); None when nothing tells how large it is.

    A parametric bootstrap: losses are drawn again around each parabola. The noise's deviation is estimated from the
    residuals of all curves together, and is drawn again too, because few runs leave it uncertain. A curve through three
    sizes has no residuals, and learns from the others.
    """
    curves = [curve for curve in curves if curve.has_optimum]
    fitted = [np.polyval(curve.coefficients, np.log(curve.params)) for curve in curves]
    freedom = sum(len(curve.params) - 3 for curve in curves)
    if freedom < 1:
        return None
    squares = sum(float(((curve.losses - fit) ** 2).sum()) for curve, fit in zip(curves, fitted, strict=True))
    rng = np.random.default_rng(seed)
    deviations = np.sqrt(squares / rng.chisquare(freedom, (num_resamples, 1)))
    best = []
    for curve, fit in zip(curves, fitted, strict=True):
        center = np.log(curve.params).mean()
        powers = np.vander(np.log(curve.params) - center, 3)                   # (runs, 3)
        solve = np.linalg.pinv(powers).T                                       # (runs, 3): values @ solve = a parabola
        losses = fit + deviations * rng.standard_normal((num_resamples, len(fit)))
        a, b, c = (losses @ solve).T                                           # (R,) each
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
    interval:    tuple[float, float] | None  # of the exponent

    def predict(self, x: NDArray | float) -> NDArray | float:
        return self.coefficient * np.power(x, self.exponent)


def fit_power_law(x: NDArray, y: NDArray, resampled: NDArray | None = None) -> PowerLaw | None:
    """A straight line in log-log through (K,) points, by least squares; None through fewer than two different x.

    resampled: (R, K) other draws of y, from which the exponent's interval is taken
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
    """The middle INTERVAL_PCT of the draws; None when most of them gave no value."""
    values = values[np.isfinite(values)] if np.isfinite(values).mean() > 0.5 else values[:0]
    tail = (100 - INTERVAL_PCT) / 2
    return tuple(float(v) for v in np.percentile(values, (tail, 100 - tail))) if len(values) else None


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
    """Approach 3: Huber loss on log residuals, L-BFGS from a grid of starts; None with too few or too similar runs."""
    if len(losses) < MIN_PARAMETRIC_RUNS or len(np.unique(params)) < 3 or len(np.unique(tokens)) < 3:
        return None
    # the constants of centered logarithms hardly depend on the exponents, which the plain ones follow at every step
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
    """(5,) log E, log A, log B, alpha, beta: for given exponents the rest is linear, and least squares gives it."""
    log_params, log_tokens, log_losses = data
    columns = torch.stack([torch.ones_like(log_params), (-alpha * log_params).exp(), (-beta * log_tokens).exp()], 1)
    losses = log_losses.exp()
    constants = torch.linalg.lstsq(columns, losses[:, None]).solution[:, 0]
    floor = 1e-2 * float(losses.min())    # all three are positive, whatever the runs say of wrong exponents
    return torch.cat([constants.clamp_min(floor).log(), torch.tensor([alpha, beta], dtype=losses.dtype)])


def predict_log_loss(theta: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """(runs,) ln L(N, D)."""
    log_E, log_A, log_B, alpha, beta = theta
    log_params, log_tokens, _ = data
    terms = torch.stack([log_E.expand_as(log_params), log_A - alpha * log_params, log_B - beta * log_tokens])
    return terms.logsumexp(0)


def measure_misfit(theta: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """Huber loss of the log residuals in units of delta, so that the optimizer's tolerances mean something."""
    residuals = (predict_log_loss(theta, data) - data[2]) / HUBER_DELTA
    return torch.nn.functional.huber_loss(residuals, torch.zeros_like(residuals), reduction="sum")


def minimize(start: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """The theta near `start` that fits best."""
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
