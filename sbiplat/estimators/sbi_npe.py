r"""A posterior density that sbi trained: :math:`q(\theta | x)` over the user's own parameters, rebuilt from a description.

sbi's `posterior_nn(model=..., hidden_features=..., ...)` makes a net from the shapes of theta and x alone; the weights and the constants of
its standardisation are then loaded. So a run holds safetensors and JSON, and loading it runs no code of its own. A few pairs and their
log-densities are kept beside the weights: another version of sbi that computes other densities from them is refused.

It is no density over z, as NPE's is: it may leak beyond the prior's support. `posteriors.theta_space` sees to both.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.estimators.base import Architecture, Estimator
from sbiplat.nets import embeddings
from sbiplat.observation import ObservationSpec
from sbiplat.settings import setting

MODELS = ("maf", "maf_rqs", "nsf", "mdn", "made", "zuko_nice", "zuko_maf", "zuko_nsf", "zuko_ncsf", "zuko_sospf", "zuko_naf", "zuko_unaf",
          "zuko_gf", "zuko_bpf")
Z_SCORES = ("independent", "structured", "none")
PROBES = 8
TOLERANCE = 1e-3  # relative; another processor rounds differently


@dataclass(frozen=True)
class SbiSettings:
    """The arguments of sbi's `posterior_nn`, by its names; where one has no default here, it is sbi's own."""

    model: str = setting("maf", "the family of densities", among=MODELS)
    z_score_theta: str = setting("independent", "how theta is standardised", among=Z_SCORES)
    z_score_x: str = setting("independent", "how x is standardised", among=Z_SCORES)
    hidden_features: int = setting(50, "width of the hidden layers", low=1, high=65536)
    num_transforms: int = setting(5, "transforms of a flow", low=1, high=256)
    num_bins: int = setting(10, "bins of a spline flow", low=1, high=1024)
    num_components: int = setting(10, "components of mdn", low=1, high=1024)
    embedding: str = setting("none", "sbi's embedding_net: none, an installed embedding, or file.py:Class of your own")
    num_blocks: int | None = setting(None, "maf, nsf, maf_rqs: blocks of each transform's net", low=1, high=256)
    dropout_probability: float | None = setting(None, "maf, nsf, maf_rqs", low=0.0, high=1.0)
    use_batch_norm: bool | None = setting(None, "maf, nsf, maf_rqs")
    tail_bound: float | None = setting(None, "nsf, maf_rqs: where the splines end", low=0.0)
    hidden_layers_spline_context: int | None = setting(None, "nsf of one parameter", low=0, high=256)
    num_mixture_components: int | None = setting(None, "components of made", low=1, high=1024)
    randperm: bool | None = setting(None, "zuko_maf, zuko_naf, zuko_unaf")
    randmask: bool | None = setting(None, "zuko_nice")
    signal: int | None = setting(None, "zuko_naf, zuko_unaf", low=1, high=65536)
    degree: int | None = setting(None, "zuko_sospf, zuko_bpf", low=1, high=256)
    polynomials: int | None = setting(None, "zuko_sospf", low=1, high=256)
    components: int | None = setting(None, "zuko_gf", low=1, high=1024)


class SbiNPE(Estimator):
    """The density q(theta | x) of a net of sbi's; see the module's docstring. theta is the user's own, in float32."""

    settings: SbiSettings
    settings_class = SbiSettings
    posterior = "theta_space"
    made_by = "train it with sbi and hand it over with sp.from_sbi(estimator, bank, out=...)"

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.event = condition_shape(self.spec, self.settings)
        self.embedding, self.net = _apart(build_net(self.settings, self.dim, self.spec))
        self.register_buffer("probe_theta", torch.zeros(PROBES, self.dim))
        self.register_buffer("probe_x", torch.zeros(PROBES, *self.event))
        self.register_buffer("probe_log_prob", torch.zeros(PROBES))
        self.register_load_state_dict_post_hook(_check_probes)

    def adopt(self, trained: nn.Module, theta: Tensor, x: dict[str, Tensor]) -> None:
        """Take the weights of a trained net of sbi's; raises SettingError unless both give the same densities of theta (B, D) given x."""
        given = ", ".join(f"{k} = {v!r}" for k, v in asdict(self.settings).items() if v is not None)
        mend = f"sbi built it with other arguments than {given}; name those that it was built with"
        whole = build_net(self.settings, self.dim, self.spec)
        if tuple(trained.input_shape) != (self.dim,) or tuple(trained.condition_shape) != self.event:
            flat = "; without an embedding x is flattened" if self.settings.embedding == "none" else ""
            raise SettingError(f"the net takes theta {tuple(trained.input_shape)} and x {tuple(trained.condition_shape)}; with this bank "
                               f"and these arguments they are {(self.dim,)} and {self.event}{flat}")
        try:
            whole.load_state_dict({k: v.detach().cpu().clone() for k, v in trained.state_dict().items()})
        except RuntimeError as error:
            first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
            raise SettingError(f"{mend} ({first[:200]})") from None
        self.embedding, self.net = _apart(whole)
        self.eval()
        with torch.no_grad():
            device = next(trained.parameters()).device
            was_training = trained.training
            ready, theta = self.prepare(x)["x"], theta.float()
            wanted = trained.eval().log_prob(theta[None].to(device), condition=ready.to(device))[0].cpu()
            trained.train(was_training)
            found = self.log_prob(theta, self.context({"x": ready}))
        apart = _farthest(found, wanted)
        if not apart <= 1e-4:
            raise SettingError(f"{mend} (its log-densities differ by up to {apart:.2g}, relative)")
        self.probe_theta.copy_(theta[:PROBES])
        self.probe_x.copy_(ready[:PROBES])
        self.probe_log_prob.copy_(found[:PROBES])

    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """x as sbi was given it: float32, flattened where there is no embedding; no declared transform."""
        return {"x": x["x"].float().reshape(-1, *self.event)}

    prepare_differentiably = prepare

    def context(self, x: dict[str, Tensor]) -> Tensor:
        """sbi's standardised and embedded x, (B, C)."""
        return self.embedding(x["x"])

    def log_prob(self, theta: Tensor, context: Tensor) -> Tensor:
        """log q(theta | context) over the user's theta (N, D), context (N, C): (N,); its mass beyond the support is not taken off."""
        return self.net.log_prob(theta[None], condition=context)[0]

    def sample(self, context: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """n draws of theta for each of B contexts (B, C): (B, n, D); some may lie beyond the prior's support."""
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # sbi's nets take no generator
            torch.manual_seed(seed)
            return self.net.sample((n,), condition=context).transpose(0, 1)


def condition_shape(spec: ObservationSpec, settings: SbiSettings) -> tuple[int, ...]:
    """The shape of x as sbi's net takes it; raises SettingError for a dict, which it does not take."""
    if not spec.plain:
        raise SettingError(f"x is a dict ({', '.join(spec.shapes)}), and sbi's nets take one array; let the simulator return one")
    return spec.shapes["x"] if settings.embedding != "none" else (spec.size,)


def build_net(settings: SbiSettings, dim: int, spec: ObservationSpec) -> Any:
    """sbi's net of these arguments and shapes, weights to be loaded; raises SettingError where sbi is missing or refuses them."""
    posterior_nn = require_sbi()
    arguments = {k: v for k, v in asdict(settings).items() if v is not None}
    embedding = arguments.pop("embedding")
    if embedding in embeddings.BUILT_IN and embedding != "none":
        raise SettingError(f"embedding = {embedding!r} is sbiplat's own net; name the class that sbi was given as embedding_net, or none")
    if embedding != "none":
        arguments["embedding_net"] = embeddings.of_user(embedding, spec)
    shape = condition_shape(spec, settings)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of one parameter, and of scales of rows that are only there for their shape
            return posterior_nn(**arguments)(torch.randn(16, dim), torch.randn(16, *shape)).eval()
    except Exception as error:
        line = (str(error) or repr(error)).splitlines()[0]
        raise SettingError(f"sbi cannot build a net for theta {(dim,)} and x {shape} from these arguments: {line}") from error


def require_sbi() -> Any:
    """sbi's `posterior_nn`; raises SettingError with the mend where sbi is not installed."""
    try:
        from sbi.neural_nets import posterior_nn
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sbi":
            raise
        raise SettingError("this needs sbi, which is not installed: pip install 'sbiplat[sbi]'") from None
    return posterior_nn


def _apart(net: Any) -> tuple[nn.Module, Any]:
    """The embedding, and the density given what it returns: x is then embedded once, not once a draw."""
    holder = net if hasattr(net, "_embedding_net") else net.net
    embedding = holder._embedding_net
    with torch.no_grad():
        width = embedding(torch.zeros(1, *net.condition_shape)).shape[1:]
    holder._embedding_net = nn.Identity()
    net._condition_shape = torch.Size(width)
    return embedding, net


def _farthest(found: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to 1 + |wanted|."""
    return float(((found - wanted).abs() / (1 + wanted.abs())).max())


@torch.no_grad()
def _check_probes(module: SbiNPE, keys: Any) -> None:
    if keys.missing_keys or keys.unexpected_keys:
        return
    was_training = module.training
    module.eval()
    apart = _farthest(module.log_prob(module.probe_theta, module.context({"x": module.probe_x})), module.probe_log_prob)
    module.train(was_training)
    if not apart <= TOLERANCE:
        raise RuntimeError(f"sbi {version('sbi')} computes other densities from these weights than the sbi that they came from; "
                           "install the version that run.json names")
