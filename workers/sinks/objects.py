"""The kind object: one object for each revision in S3, GCS or Azure, by obstore (extra `object`)."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from app.errors import SettingsError
from app.order_document import OrderDocument
from app.sink_settings import ObjectSink
from workers.sinks.contract import Context, Failed, Unavailable

CONNECT_TIMEOUT: Final = timedelta(seconds=5)
TIMEOUT: Final = timedelta(seconds=10)
"""Of one request, and after it none is repeated. RQ's time limit cannot interrupt obstore: three requests for
credentials and one for the object, each repeated once, must end within it."""

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>")
"""How all three write the code of an error into the answer, such as AccessDenied."""

_QUOTED: Final = re.compile(r"""["'`].*["'`]|/\S+""")
_MAY_PASS: Final = {"408", "409", "429"}


class Objects:
    """Creates objects and never replaces one: one that exists was delivered."""

    package = "workers"

    def __init__(self, declared: ObjectSink) -> None:
        """Read the credentials' variables; raises SettingsError if obstore or a variable is missing."""
        try:
            from obstore.store import from_url  # here: an extra, which processes without this sink do not need
        except ModuleNotFoundError:
            raise SettingsError("needs obstore: pip install 'ota-receiver[object]'") from None
        try:
            self._store = from_url(
                declared.url,
                client_options={
                    "allow_http": declared.allow_http,
                    "connect_timeout": CONNECT_TIMEOUT,
                    "timeout": TIMEOUT,
                },
                retry_config={"max_retries": 1, "retry_timeout": TIMEOUT},
            )
        except Exception as error:
            # The text, less what it quotes: values and file names, either of which may be a secret.
            text = str(error).partition("\n")[0].rpartition("error: ")[2]
            raise SettingsError(f"obstore refuses its variables: {_QUOTED.sub('…', text)}") from None

    def deliver(self, document: OrderDocument, context: Context) -> None:
        """Create the object unless it exists; raises Unavailable if no object can be made now, Failed if refused."""
        import obstore
        from obstore.exceptions import BaseError

        day = datetime.fromtimestamp(document.fetched_at / 1000, UTC).date()
        name = f"{document.revision}-{document.digest}"
        try:
            obstore.put(
                self._store,
                f"{document.company}/{day}/{document.order_id}/{name}.json",
                document.encode(),
                attributes={"Content-Type": "application/json"},
                mode="create",
                use_multipart=False,
            )
        except (BaseError, FileNotFoundError) as error:
            if failure := _failure(str(error), document.digest):
                raise failure from error


def _failure(text: str, digest: str) -> Failed | None:
    """Return what an error of obstore means, None if the object exists; its text holds the store's whole answer.

    409 alone does not say that the object exists: S3 answers it while another request writes the object, which may yet
    fail, and obstore raises the same error as for 412.
    """
    status, code = _STATUS.search(text), _CODE.search(text)
    # Else the request was one for credentials.
    is_of_object = digest in text
    what = "" if is_of_object else "credentials: "
    if status is None:
        is_sent = "HTTP error" in text and "builder error" not in text
        if is_sent:
            return Unavailable(f"{what}no answer")
        return Failed(f"{what}no address, http:// without allow_http, or the wrong region")
    if is_of_object and (status[1] == "412" or (code and code[1] == "BlobAlreadyExists")):
        return None
    kind = Unavailable if status[1] >= "500" or status[1] in _MAY_PASS else Failed
    return kind(f"{what}HTTP {status[1]}" + (f" {code[1]}" if code else ""))
