"""docs/api.md from the comments of node.proto: `make protos` runs it, a test sees that it was run.

python protos/reference.py protos docs/api.md
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2 as dpb
from grpc_tools import protoc

PROTO = "deca/v1/node.proto"
HEAD = """# The gRPC services of a node

Made by `make protos` from the comments of [node.proto](../protos/{proto}), which is the
contract: fields are appended, never renumbered. A node answers all of them on one port, along
with the standard [health service](https://grpc.io/docs/guides/health-checking/)'s `Check` and
[server reflection](https://grpc.io/docs/guides/reflection/), so that `grpcurl` needs no file:

```console
$ cd ~/.config/deca-node/bbc
$ grpcurl -cacert authority.pem -cert operator.pem -key operator.key -authority bbc.deca.internal \\
    192.0.2.2:7430 deca.v1.Status/GetStatus
```

The folder is that of the run `bbc` ([securing.md](securing.md#the-folder)), and the name is
`RUN.deca.internal` for every run: certificates name run and node, not hosts. A member's
certificate in `nodes/` does as well, but for the service Control, which wants the operator's or
the machine's socket file. In plain text (a node on the loopback, or with `--insecure`)
nothing is shown:

```console
$ grpcurl -plaintext 127.0.0.1:7430 list
$ grpcurl -plaintext 127.0.0.1:7430 deca.v1.Status/GetStatus
```

[protocol.md](protocol.md) says how nodes use them among each other.
"""

Field = dpb.FieldDescriptorProto
# Where things lie in a file's source paths: descriptor.proto's own field numbers.
MESSAGE, ENUM, SERVICE = 4, 5, 6
METHOD, VALUE, MEMBER, NESTED, NESTED_ENUM = 2, 2, 2, 3, 4


def described(folder: Path) -> dpb.FileDescriptorProto:
    """The contract with its comments."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        arguments = ["protoc", f"-I{folder}", "--include_source_info", f"-o{out}", PROTO]
        if protoc.main(arguments):
            raise SystemExit(f"{PROTO} cannot be compiled")
        return dpb.FileDescriptorSet.FromString(out.read_bytes()).file[0]


class Page:
    """The page, line by line."""

    def __init__(self, file: dpb.FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(place.path): f"{place.leading_comments} {place.trailing_comments}"
            for place in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        """All of it."""
        yield HEAD.format(proto=PROTO)
        for number, service in enumerate(self._file.service):
            path = (SERVICE, number)
            yield f"## {service.name}\n\n{self._said(path)}\n"
            yield "| call | takes | gives | |\n|---|---|---|---|"
            for index, call in enumerate(service.method):
                gives = ("stream of " if call.server_streaming else "") + self._kind(
                    call.output_type
                )
                takes = self._kind(call.input_type)
                yield f"| {call.name} | {takes} | {gives} | {self._said((*path, METHOD, index))} |"
            yield ""
        yield "## Messages\n"
        yield from self._messages(self._file.message_type, (MESSAGE,), "")
        yield "## Enumerations\n"
        yield from self._enums(self._file.enum_type, (ENUM,), "")

    def _messages(
        self, messages: Sequence[dpb.DescriptorProto], path: tuple[int, ...], outer: str
    ) -> Iterator[str]:
        for number, message in enumerate(messages):
            if message.options.map_entry:
                continue
            here, name = (*path, number), outer + message.name
            yield f"### {name}\n\n{self._said(here)}".rstrip() + "\n"
            if message.field:
                yield "| field | type | number | |\n|---|---|---|---|"
            maps = {one.name: one for one in message.nested_type if one.options.map_entry}
            for index, field in enumerate(message.field):
                shown = self._type(field, maps)
                said = self._said((*here, MEMBER, index))
                yield f"| {field.name} | {shown} | {field.number} | {said} |"
            yield ""
            yield from self._enums(message.enum_type, (*here, NESTED_ENUM), f"{name}.")
            yield from self._messages(message.nested_type, (*here, NESTED), f"{name}.")

    def _enums(
        self, enums: Sequence[dpb.EnumDescriptorProto], path: tuple[int, ...], outer: str
    ) -> Iterator[str]:
        for number, enum in enumerate(enums):
            here = (*path, number)
            yield f"### {outer}{enum.name}\n\n{self._said(here)}".rstrip() + "\n"
            yield "| value | number | |\n|---|---|---|"
            for index, value in enumerate(enum.value):
                yield f"| {value.name} | {value.number} | {self._said((*here, VALUE, index))} |"
            yield ""

    def _said(self, path: tuple[int, ...]) -> str:
        return " ".join(self._comments.get(path, "").split()).replace("|", "\\|")

    def _kind(self, name: str) -> str:
        short = name.removeprefix(f".{self._file.package}.")
        return f"[{short}](#{short.lower().replace('.', '')})"

    def _type(self, field: Field, maps: dict[str, dpb.DescriptorProto]) -> str:
        entry = maps.get(field.type_name.rpartition(".")[2])
        if entry is not None:
            key, value = entry.field
            return f"map of {self._type(key, {})} to {self._type(value, {})}"
        kind = (
            self._kind(field.type_name)
            if field.type_name
            else Field.Type.Name(field.type).removeprefix("TYPE_").lower()
        )
        if field.label == Field.LABEL_REPEATED:
            return f"list of {kind}"
        return f"{kind}, or absent" if field.proto3_optional else kind


def reference(folder: Path) -> str:
    """The page's text."""
    return "\n".join(Page(described(folder)).lines()).rstrip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(reference(Path(sys.argv[1])), encoding="utf-8")
