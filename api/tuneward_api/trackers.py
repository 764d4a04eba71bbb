"""Where a training's figures go besides its run directory. Beside finetunejob.py, which holds the rest."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from tuneward_api.base import Model, Record

TrackerName = Literal["wandb", "mlflow", "trackio"]
PROJECT: Final = "tuneward"
"""Of whatever a tracker groups runs by, where nothing is said."""

SECRET_KEYS: Final[dict[TrackerName, dict[str, str]]] = {
    "wandb": {"WANDB_API_KEY": "WANDB_API_KEY"},
    "mlflow": {
        "MLFLOW_TRACKING_TOKEN": "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_USERNAME": "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
    },
    "trackio": {"token": "HF_TOKEN"},
}
"""Key of the Secret -> environment variable of the training pods, where the tracker's own library looks for it. On a
workstation the same variables are taken from the environment."""

_SecretName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
_Text = Annotated[str, Field(min_length=1, max_length=128)]


class TrackerSecretRef(Model):
    """A Secret of the job's namespace."""

    name: _SecretName = Field(description="Name of the Secret. Its keys reach the training pods, as environment alone.")


class WandB(Model):
    """Weights & Biases."""

    project: _Text | None = Field(None, description=f"Project. Default: {PROJECT}.")
    entity: _Text | None = Field(None, description="User or team. Default: the key's own.")
    group: _Text | None = Field(None, description="Group of runs. Default: none.")
    base_url: Annotated[str, Field(max_length=512, pattern=r"^https?://[^@\s]+$")] | None = Field(
        None, description="Address of a server of your own. Default: https://api.wandb.ai."
    )
    secret_ref: TrackerSecretRef | None = Field(None, description="Secret with the key WANDB_API_KEY.")


class MLflow(Model):
    """MLflow."""

    tracking_uri: Annotated[str, Field(max_length=512, pattern=r"^(https?|file)://[^@\s]+$")] = Field(
        description="Address of the tracking server, https://… (or file:///PATH). A name and password go into the Secret."
    )
    experiment: _Text | None = Field(None, description=f"Experiment, made where it is absent. Default: {PROJECT}.")
    secret_ref: TrackerSecretRef | None = Field(
        None, description="Secret with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    )


class Trackio(Model):
    """Trackio, of Hugging Face."""

    project: _Text | None = Field(None, description=f"Project. Default: {PROJECT}.")
    space: Annotated[str, Field(max_length=128, pattern=r"^[\w.-]+/[\w.-]+$")] | None = Field(
        None,
        description="Space, OWNER/NAME, made where it is absent. Default: a local database; in a cluster that of the run "
        "directory.",
    )
    secret_ref: TrackerSecretRef | None = Field(None, description="Secret with the key token, for the Space.")


class Trackers(Model):
    """Where a training's figures go besides its run directory, which always holds them for TensorBoard."""

    wandb: WandB | None = Field(None, description="Weights & Biases; its image needs tuneward[wandb].")
    mlflow: MLflow | None = Field(None, description="MLflow; its image needs tuneward[mlflow].")
    trackio: Trackio | None = Field(None, description="Trackio; its image needs tuneward[trackio].")

    def asked(self) -> dict[TrackerName, WandB | MLflow | Trackio]:
        named: dict[TrackerName, WandB | MLflow | Trackio | None] = {
            "wandb": self.wandb,
            "mlflow": self.mlflow,
            "trackio": self.trackio,
        }
        return {name: settings for name, settings in named.items() if settings is not None}


class TrackerStatus(Model):
    """A tracker that the job asked for."""

    name: str = Field(max_length=16, description="wandb, mlflow or trackio.")
    url: str | None = Field(None, max_length=512, description="Where its run is to be seen.")
    message: str | None = Field(
        None, max_length=512, description="Why it has not got all figures; absent while it gets them. Training goes on."
    )


class TrackerState(Record):
    """The same between trainer and operator."""

    name: str
    url: str = ""
    message: str = ""
