"""Keys, certificates and signatures: the only file that imports cryptography.

All keys are of the curve P-256: gRPC's TLS takes no Ed25519 certificates. Everything that is kept
or sent is PEM, as bytes.
"""

import datetime as dt
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deca_node.errors import TrustError
from deca_node.limits import MAX_CERTIFICATE_BYTES, MAX_REVOKED
from deca_node.trust import (
    CLOCK_SECONDS,
    Certificate,
    common_name,
    holder,
    node_name,
    node_uri,
    operator_uri,
    pairing_name,
)

# The authority outlives every run.
AUTHORITY_DAYS = 3650.0
# What an authority's signature under a revocation begins with, so that it cannot be one under
# anything else: a certificate's signed part begins with another byte.
_REVOKES = "deca-node revokes"
_HASH = hashes.SHA256()
# What the library raises at what somebody else has made.
_TROUBLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def new_key() -> bytes:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except _TROUBLE:
        raise TrustError("not a private key in PEM form") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise TrustError("not a P-256 key, which gRPC's TLS needs")
    return key


def check_key(pem: bytes) -> None:
    """Whether it is a private key that a node can use.

    Raises:
        TrustError: it is not.
    """
    _private(pem)


def _loaded(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except _TROUBLE:
        raise TrustError("not a certificate in PEM form") from None


def new_request(key: bytes) -> bytes:
    """A request for a certificate over a private key, which proves that its sender has the key."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(_private(key), _HASH).public_bytes(serialization.Encoding.PEM)


@functools.lru_cache(maxsize=1024)  # a caller shows the same one at every call
def read(pem: bytes) -> Certificate:
    """What a certificate says.

    Raises:
        TrustError: it is none.
    """
    found = _loaded(pem)
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, *_TROUBLE):
        uris = []
    return Certificate(
        holder(uris),
        found.not_valid_before_utc.timestamp(),
        found.not_valid_after_utc.timestamp(),
        found.serial_number,
    )


def fingerprint(pem: bytes) -> bytes:
    """SHA-256 of a certificate's DER form, 32 bytes."""
    return _loaded(pem).fingerprint(_HASH)


def alone(pem: bytes) -> bytes:
    """The first certificate of a text that somebody sent, and nothing else of it.

    TLS believes all that stand in a text of authorities; fingerprints are of the first.

    Raises:
        TrustError: there is none.
    """
    return _loaded(pem).public_bytes(serialization.Encoding.PEM)


def to_pem(der: bytes) -> bytes:
    """A certificate as TLS gives it.

    Raises:
        TrustError: it is none.
    """
    try:
        return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
    except _TROUBLE:
        raise TrustError("not a certificate") from None


def run_of(authority: bytes) -> str:
    """The run whose authority's certificate this is.

    Raises:
        TrustError: it is no authority's.
    """
    found = _loaded(authority)
    try:
        limits = found.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, *_TROUBLE):
        limits = None
    name = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if limits is None or not limits.ca or not name:
        raise TrustError("not the certificate of a run's authority")
    return str(name[0].value)


def fits(key: bytes, certificate: bytes) -> bool:
    """Whether a private key is the certificate's.

    Raises:
        TrustError: one of them is none.
    """
    own, found = _private(key).public_key(), _loaded(certificate)
    try:
        return own == found.public_key()
    except _TROUBLE:  # a kind of key that is not known here
        return False


def check_pair(key: bytes, certificate: bytes, authority: bytes) -> None:
    """Whether a key, its certificate and the authority's belong together.

    Raises:
        TrustError: they do not.
    """
    if not fits(key, certificate):
        raise TrustError("the key is not the certificate's")
    try:
        _loaded(certificate).verify_directly_issued_by(_loaded(authority))
    except (*_TROUBLE, InvalidSignature):
        raise TrustError(
            "the certificate was issued by another authority than this run's"
        ) from None


def _revocation(run: str, node: str) -> bytes:
    return "\n".join((_REVOKES, run, node)).encode()


@functools.lru_cache(maxsize=MAX_REVOKED)  # while a file is damaged, the list is read at each look
def revokes(authority: bytes, node: str, signature: bytes) -> bool:
    """Whether a signature of the authority says that a node is out of its run."""
    key = _loaded(authority).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, _revocation(run_of(authority), node), ec.ECDSA(_HASH))
    except InvalidSignature:
        return False
    return True


@dataclass(frozen=True)
class Authority:
    """Who says which machines belong to a run.

    Attributes:
        key: private; whoever has it can let anybody in.
        certificate: its own, which every member has.
    """

    key: bytes
    certificate: bytes

    @classmethod
    def new(cls, run: str, now: float) -> "Authority":
        """An authority for a new run."""
        key = new_key()
        public = _private(key).public_key()
        builder = _builder(_named(run), _named(run), public, now, AUTHORITY_DAYS)
        made = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(_private(key), _HASH)
        )
        return cls(key, made.public_bytes(serialization.Encoding.PEM))

    @property
    def run(self) -> str:
        """The run's name."""
        return run_of(self.certificate)

    def issue(self, request: bytes, node: str, now: float, days: float) -> bytes:
        """A node's certificate.

        Args:
            request: as from ``new_request``; the name in it counts for nothing.
            node: whom it will name.
            now: seconds since 1970.
            days: that it is good for.

        Raises:
            TrustError: the request is none.
        """
        run = self.run
        names: list[x509.GeneralName] = [
            x509.DNSName(common_name(run)),
            x509.DNSName(node_name(run, node)),
            x509.UniformResourceIdentifier(node_uri(run, node)),
        ]
        return self._issue(request, node, names, now, days, serves=True, calls=True)

    def issue_operator(self, request: bytes, now: float, days: float) -> bytes:
        """A certificate with which a person may control nodes; it cannot pass for a node's."""
        names = [x509.UniformResourceIdentifier(operator_uri(self.run))]
        return self._issue(request, "operator", names, now, days, serves=False, calls=True)

    def issue_pairing(self, request: bytes, now: float, days: float) -> bytes:
        """A certificate for the time of an invitation; it opens no node."""
        names = [x509.DNSName(pairing_name(self.run))]
        return self._issue(request, "pairing", names, now, days, serves=True, calls=False)

    def revoke(self, node: str) -> bytes:
        """The signature by which all members know that a node is out."""
        return _private(self.key).sign(_revocation(self.run, node), ec.ECDSA(_HASH))

    def _issue(
        self,
        request: bytes,
        subject: str,
        names: Sequence[x509.GeneralName],
        now: float,
        days: float,
        *,
        serves: bool,
        calls: bool,
    ) -> bytes:
        public = _requested(request)
        issuer = _loaded(self.certificate)
        uses = [ExtendedKeyUsageOID.SERVER_AUTH] * serves + [
            ExtendedKeyUsageOID.CLIENT_AUTH
        ] * calls
        made = (
            _builder(_named(subject), issuer.subject, public, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_issued_by(issuer), critical=False)
            .sign(_private(self.key), _HASH)
        )
        return made.public_bytes(serialization.Encoding.PEM)


def _requested(request: bytes) -> ec.EllipticCurvePublicKey:
    """The public key that a certificate is asked for."""
    if len(request) > MAX_CERTIFICATE_BYTES:
        raise TrustError("the request for a certificate is too long")
    try:
        found = x509.load_pem_x509_csr(request)
        public = found.public_key()
        proven = found.is_signature_valid
    except (*_TROUBLE, InvalidSignature):
        raise TrustError("not a request for a certificate in PEM form") from None
    p256 = isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1"
    if not proven or not p256:
        raise TrustError("the request for a certificate is not signed by a P-256 key of its own")
    assert isinstance(public, ec.EllipticCurvePublicKey)  # noqa: S101 - narrows the type
    return public


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _issued_by(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    mark = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(mark)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: float,
    days: float,
) -> x509.CertificateBuilder:
    begin = dt.datetime.fromtimestamp(now - CLOCK_SECONDS, dt.UTC)
    end = dt.datetime.fromtimestamp(now, dt.UTC) + dt.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
