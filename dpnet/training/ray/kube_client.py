"""The Kubernetes API of one namespace: the few requests that the launcher `kuberay` makes.

Credentials come from the pod's service account or from the kubeconfig, never from our config. A
refused credential is read again once, because tokens rotate. Nothing here waits and tries again:
the launcher does that.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.text import duration
from dpnet.training.ray.rayjob import GROUP, MANAGER, PLURAL, VERSION
from dpnet.training.settings import LaunchSettings

T = TypeVar("T")

# Everything that the launcher asks of Kubernetes: group, resource, verbs. All in one namespace.
ACCESS = (
    (GROUP, PLURAL, ("create", "get", "list", "watch", "delete")),
    ("", "pods", ("list",)),
    ("", "events", ("list",)),
)
ANSWER_S = 20.0  # how long to wait for the answer to a request
WATCH_S = 30  # after which the server ends a watch, and the next one begins
_QUIET_S = WATCH_S + 30.0  # without a byte, after which a watch counts as dead
_LONGEST_WAIT_S = 60.0  # that a server may ask for
_SAME_CLOCK_S = 60.0  # difference of clocks that is not worth a word
_TRIES_S = (2.0, 4.0)  # between the looks of `check_cluster`
_IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class KubeError(Exception):
    """A request that did not succeed; the text says why, in words that can stand in brackets.

    Attributes:
        status: HTTP status; 0 if there was no answer.
        verb: What was asked for, such as watch.
        wait: Seconds that the server asks to wait, or None.
        passes: Whether the same request can succeed later without a change.
        advice: What to do, for an error that does not pass.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        advice: str = "",
        wait: float | None = None,
        verb: str = "",
    ) -> None:
        super().__init__(text)
        self.status, self.wait, self.advice, self.verb = status, wait, advice, verb
        self.passes = not advice


def role(namespace: str, name: str = MANAGER) -> dict[str, Any]:
    """Return the Role with exactly the rights in ACCESS."""
    rules = [
        {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}
        for group, resource, verbs in ACCESS
    ]
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": name, "namespace": namespace},
        "rules": rules,
    }


class Kube:
    """A client for the RayJobs, pods and events of one namespace.

    Args:
        context: Context of the kubeconfig; None: its current one, or the pod's service account.
        namespace: The namespace; None: that of the context or of the pod.

    Raises:
        ConfigError: There are no credentials here, or they cannot be read.
    """

    def __init__(self, context: str | None, namespace: str | None) -> None:
        self._context = context
        self._api: Any = None
        found = self._connect()
        self.namespace = namespace or found

    def create(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Create a RayJob. Fields that Kubernetes does not know are refused."""
        return self._on_jobs(
            "create", "create_namespaced_custom_object", dict(job), field_validation="Strict"
        )

    def try_create(self, job: Mapping[str, Any]) -> None:
        """Ask whether a RayJob could be created, and create none."""
        self._on_jobs(
            "create",
            "create_namespaced_custom_object",
            dict(job),
            field_validation="Strict",
            dry_run="All",
        )

    def get(self, name: str) -> dict[str, Any]:
        """Return a RayJob. Raises KubeError 404 if there is none."""
        return self._on_jobs("get", "get_namespaced_custom_object", name)

    def jobs(self, labels: str = "", name: str = "") -> tuple[list[dict[str, Any]], str]:
        """Return the RayJobs with these labels or this name, and the version of the list."""
        found = self._on_jobs("list", "list_namespaced_custom_object", **_selectors(labels, name))
        return found["items"], found["metadata"]["resourceVersion"]

    def watch(self, name: str, since: str) -> Iterator[dict[str, Any]]:
        """Yield the changes of a RayJob after a version, until the server ends the watch.

        Each is a dictionary with `type` (ADDED, MODIFIED, DELETED, BOOKMARK) and `object`. Raises
        KubeError 410 if the version is too old: list again.
        """
        from kubernetes import client, watch

        def stream() -> Iterator[dict[str, Any]]:
            custom = client.CustomObjectsApi(self._api)
            return watch.Watch().stream(  # type: ignore[no-any-return]
                custom.list_namespaced_custom_object,
                *self._kind,
                **_selectors("", name),
                resource_version=since,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_S,
                _request_timeout=(ANSWER_S, _QUIET_S),
            )

        events = self._request("watch", f"{PLURAL}.{GROUP}", stream)
        while True:
            try:
                event = self._request("watch", f"{PLURAL}.{GROUP}", lambda: next(events, None))
            except (KeyError, TypeError, ValueError) as error:  # half an event
                raise KubeError(0, f"an event of the watch cannot be read ({error})") from error
            if event is None:
                return
            yield event

    def delete(self, name: str) -> None:
        """Delete a RayJob; the cluster then deletes what belongs to it. A missing one is fine."""
        try:
            self._on_jobs(
                "delete", "delete_namespaced_custom_object", name, propagation_policy="Background"
            )
        except KubeError as error:
            if error.status != 404:
                raise

    def pods(self, labels: str) -> list[dict[str, Any]]:
        """Return the pods with these labels."""
        return self._core("pods", "list_namespaced_pod", label_selector=labels)

    def events(self) -> list[dict[str, Any]]:
        """Return the warnings of the namespace."""
        return self._core("events", "list_namespaced_event", field_selector="type=Warning")

    @property
    def address(self) -> str:
        """Return the address of the API server."""
        return str(self._api.configuration.host)

    @property
    def _kind(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    def _on_jobs(self, verb: str, function: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        from kubernetes import client

        def ask() -> dict[str, Any]:
            custom = client.CustomObjectsApi(self._api)
            found: dict[str, Any] = getattr(custom, function)(
                *self._kind, *arguments, **options, _request_timeout=ANSWER_S
            )
            return found

        return self._request(verb, f"{PLURAL}.{GROUP}", ask)

    def _core(self, resource: str, function: str, **options: Any) -> list[dict[str, Any]]:
        from kubernetes import client

        def ask() -> list[dict[str, Any]]:
            answer = getattr(client.CoreV1Api(self._api), function)(
                self.namespace, **options, _request_timeout=ANSWER_S
            )
            found: list[dict[str, Any]] = self._api.sanitize_for_serialization(answer)["items"]
            return found

        return self._request("list", resource, ask)

    def _request(self, verb: str, resource: str, ask: Callable[[], T]) -> T:
        """Ask, with credentials that are read again once if they are refused."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        for again in (False, True):
            try:
                return ask()
            except ApiException as error:
                if error.status == 401 and not again:
                    self._connect()
                    continue
                raise self._explained(error, verb, resource) from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise self._untrusted(error) from error
                raise KubeError(0, _short(error)) from error
            except AttributeError as error:  # the client fails on its own error of TLS
                cause = error.__context__
                if not isinstance(cause, ApiException):
                    raise
                if "CERTIFICATE_VERIFY_FAILED" in str(cause):
                    raise self._untrusted(cause) from error
                raise KubeError(0, _short(cause)) from error
        raise AssertionError

    def _untrusted(self, error: Exception) -> KubeError:
        host = self._api.configuration.host
        reason = str(error).partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
        if "expired" in reason or "not yet valid" in reason:
            return KubeError(
                0,
                f"the {reason.replace('certificate', f'certificate of {host}', 1)}, by the clock of"
                f" this machine: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
                advice="set the clock if it is wrong, else renew the certificate.",
            )
        return KubeError(
            0,
            f"the certificate of {host} is not trusted: {reason or _short(error)}",
            advice="check the certificate-authority in the kubeconfig.",
        )

    def _explained(self, error: Any, verb: str, resource: str) -> KubeError:
        """Return the error for an answer of the API server, or of a proxy before it."""
        status = int(error.status or 0)
        body = _status_in(error.body)
        message = body.get("message") or _short(error.body or error.reason or "")
        causes = [each.get("reason") for each in (body.get("details") or {}).get("causes") or []]
        if status == 401:
            return KubeError(
                401,
                "the API server refuses the credentials of this user: they are wrong, or have"
                f" expired{_clocks(error.headers)}",
            )
        if status == 403 and "NamespaceTerminating" in causes:
            return KubeError(
                403,
                f"the namespace {self.namespace} is being deleted",
                advice="wait until it is gone and make it again, or set launch.namespace to"
                " another one.",
            )
        if status == 403 and "exceeded quota" in message:
            return KubeError(403, message)
        if status == 403:
            return KubeError(
                403,
                f"this user may not {verb} {resource} in the namespace {self.namespace}: {message}",
                advice=f"give it the verb {verb} on {resource} there"
                " (docs/training.md#on-kubernetes has the Role).",
                verb=verb,
            )
        if status == 404 and (body.get("details") or {}).get("kind") == "namespaces":
            return KubeError(
                404,
                f"there is no namespace {self.namespace}",
                advice=f"make it with `kubectl create namespace {self.namespace}`, or set"
                " launch.namespace.",
            )
        if status == 404 and not body:
            return KubeError(
                404,
                f"the cluster at {self._api.configuration.host} knows no {resource}",
                advice="install KubeRay 1.7 or newer there (docs/training.md#on-kubernetes has its"
                " address), or choose another cluster with launch.context.",
            )
        if status in (400, 422):
            return KubeError(
                status,
                message,
                advice="correct launch.template; its fields are those of KubeRay 1.7.",
            )
        if status in (404, 409, 410) or status == 429 or status >= 500 or status == 0:
            return KubeError(status, message, wait=_wait_in(error.headers))
        return KubeError(status, message, advice="ask who runs the cluster.")

    def _connect(self) -> str:
        """Read the credentials, and return the namespace that they come with."""
        from kubernetes import client, config

        configuration = client.Configuration()
        configuration.retries = False  # urllib3 would wait as long as any server asks it to
        try:
            if self._context is None and "KUBECONFIG" not in os.environ and _IN_POD.exists():
                config.load_incluster_config(client_configuration=configuration)
                found = (_IN_POD / "namespace").read_text().strip()
            else:
                found = _load_kubeconfig(self._context, configuration)
        except (config.ConfigException, OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(
                f"the credentials for Kubernetes cannot be read from {_kubeconfig()}"
                f" ({_short(error)}): check KUBECONFIG and launch.context with `kubectl config"
                " get-contexts`."
            ) from error
        self._api = client.ApiClient(configuration)
        return found


def _kubeconfig() -> str:
    # The library reads the variable only when it is imported.
    return os.environ.get("KUBECONFIG") or "~/.kube/config"


def _load_kubeconfig(context: str | None, configuration: Any) -> str:
    """Load a context of the kubeconfig, and return its namespace."""
    from kubernetes import config

    files = _kubeconfig()
    contexts, current = config.list_kube_config_contexts(files)
    if context is not None:
        named = [each for each in contexts if each["name"] == context]
        if not named:
            known = ", ".join(each["name"] for each in contexts)
            raise ConfigError(
                f"launch.context is {context!r}, but the kubeconfig has: {known}. Choose one."
            )
        current = named[0]
    user = str(current["context"].get("user", ""))
    program = _check_program(files, user)
    config.load_kube_config(files, context, client_configuration=configuration)
    given = configuration
    if not (given.api_key or given.cert_file or given.username):
        # The request would come from system:anonymous.
        why = f": the program {program!r} failed" if program else ""
        raise ConfigError(
            f"there are no credentials of the user {user!r} in the kubeconfig {files}{why}. Log in,"
            " or choose another context with launch.context."
        )
    return str(current["context"].get("namespace") or "default")


def _check_program(files: str, user: str) -> str:
    """Return the program that gives the credentials of a user, "" without one.

    Raises ConfigError if it is missing. The Kubernetes client would log this and continue without
    credentials.
    """
    for file in filter(None, files.split(os.pathsep)):
        path = Path(file).expanduser()
        if not path.exists():
            continue
        for each in (yaml.safe_load(path.read_text("utf-8")) or {}).get("users") or []:
            plugin = (each.get("user") or {}).get("exec") if each.get("name") == user else None
            if not plugin:
                continue
            program = str(plugin.get("command", ""))
            place = path.parent / program if os.sep in program else program
            if shutil.which(place) is None:
                hint = plugin.get("installHint")
                raise ConfigError(
                    f"the kubeconfig {path} takes the credentials of {user} from the program"
                    f" {program!r}, which is not installed: install it"
                    f"{f' ({_short(hint)})' if hint else ''}, or choose another context with"
                    " launch.context."
                )
            return program
    return ""


def read_template(path: str | None) -> dict[str, Any]:
    """Return the RayJob in a YAML file, by default the packaged one.

    Raises:
        ConfigError: The file cannot be read, or is not one RayJob.
    """
    file = Path(path).expanduser() if path else Path(__file__).with_name("rayjob.yaml")
    try:
        template = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"launch.template is {path!r}, but there is no such file: name a file with one RayJob."
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"launch.template is {path!r}, which cannot be read as YAML ({_short(error)}): name a"
            " file with one RayJob."
        ) from error
    if not isinstance(template, dict) or template.get("kind") != "RayJob":
        raise ConfigError(
            f"launch.template is {path!r}, which is not a RayJob: name a file of one."
        )
    return template


def check_cluster(launch: LaunchSettings, job: Mapping[str, Any]) -> None:
    """Ask the API server whether it would create a RayJob like this one.

    What passes by itself, such as a quota that is used up, is left to the launcher. A server that
    does not answer is asked a few times.

    Raises:
        PipelineError: It would not: no credentials, no rights, no namespace, no KubeRay, or a field
            of the template that KubeRay does not know.
    """
    kube = Kube(launch.context, launch.namespace)
    for wait in (*_TRIES_S, None):
        try:
            kube.try_create(job)
        except KubeError as error:
            if error.status == 400 and "dry run" in str(error):  # of a webhook that knows none
                return
            if not error.passes or error.status == 401:
                raise fatal(error, "no training can be started on Kubernetes") from error
            if error.status:
                return
            if wait is None:
                raise PipelineError(
                    f"the API server {kube.address} does not answer ({error}): check the network"
                    " and the server in the kubeconfig, or choose another context with"
                    " launch.context."
                ) from error
            time.sleep(wait)
        else:
            return


def fatal(error: KubeError, what: str) -> PipelineError:
    """Return the error to raise for a request that cannot succeed later."""
    kind = ConfigError if error.status == 404 else PipelineError
    advice = error.advice or "the same command resumes."
    if error.status == 401:
        advice = (
            "log in again, set the clock that is wrong, or choose another context with"
            " launch.context."
        )
    return kind(f"{what} ({error}): {advice}")


def _selectors(labels: str, name: str) -> dict[str, str]:
    found = {"label_selector": labels} if labels else {}
    return {**found, "field_selector": f"metadata.name={name}"} if name else found


def _status_in(body: Any) -> dict[str, Any]:
    """Return the Status object in an answer, {} if the answer is text."""
    try:
        found = json.loads(body)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _wait_in(headers: Any) -> float | None:
    """Return the seconds that an answer asks to wait, within reason."""
    text = (headers or {}).get("Retry-After") or ""
    return min(float(text), _LONGEST_WAIT_S) if text.isdecimal() else None


def _clocks(headers: Any) -> str:
    """Return how far the server's clock is from this machine's, "" if they agree or none is known.

    This explains an error. No deadline depends on it.
    """
    try:
        there = parsedate_to_datetime((headers or {}).get("Date") or "").timestamp()
    except ValueError:
        return ""
    ahead = there - time.time()
    if abs(ahead) < _SAME_CLOCK_S:
        return ""
    where = "ahead of" if ahead > 0 else "behind"
    return f" (its clock is {duration(abs(ahead))} {where} the clock of this machine)"


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    for plain in (
        "Connection refused",
        "Connection reset",
        "timed out",
        "Name or service not known",
    ):
        if plain in text:
            return plain
    return text[:300].rstrip(".:")
