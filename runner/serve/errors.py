"""What the server refuses, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "invalid_request_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_DEFAULT_TYPE = "invalid_request_error"


class ApiError(Exception):
    """An answer other than 200.

    Args:
        message: requirement, value and way out; it never holds a path of this machine.
        code: a name that programs look for.
        param: the field that is wrong.
        retry_after_s: the client may try again after so many seconds.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)

    def body(self) -> dict[str, Any]:
        """Return what the client gets."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, _DEFAULT_TYPE),
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that can never be done as it stands."""
    return ApiError(400, message, param=param, code=code)


def draining() -> ApiError:
    """Return the error of a server that is about to end."""
    return ApiError(
        503,
        "the server is about to end and takes no new requests; ask another one, or later",
        code="draining",
        headers={"Connection": "close"},
    )


def server_error() -> ApiError:
    """Return the error of a fault of ours; what it was stands in the server's log."""
    return ApiError(500, "the server failed on this request; its log says why", code="server_error")
