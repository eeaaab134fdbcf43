"""The notations inside of tar headers: numbers, times, PAX records, extended attributes."""

from __future__ import annotations

import base64
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfs.errors import ImageError
from clipfs.layers.pax import (
    MAX_EXTENSION,
    MAX_XATTR_VALUE,
    SPARSE_MAP,
    decimal,
    is_for_all,
    numeric,
    records,
    timestamp,
    xattrs,
)
from tests.tars import pax_records

CAPABILITY = b"\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0"


class TestNumbers:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            (b"0000644\0", 0o644),
            (b"000644 \0", 0o644),
            (b"   644 \0", 0o644),
            (b"644\0\0\0\0\0", 0o644),
            (b"77777777", 0o77777777),
            (b"644\0junk", 0o644),
            (bytes(8), 0),
            (b"        ", 0),
            (b"\x80" + bytes(10) + b"\7", 7),
            (b"\x80\0\0\0\0\0\0\x10\0\0\0\0", 1 << 36),
            (b"\xff" * 12, -1),
            (b"\xff" * 7 + b"\xfe", -2),
            (b"\xff" * 8 + b"\0\0\0\0", -(1 << 32)),
            (b"\x80\xff" + bytes(6), 0xFF << 48),
            (b"\xbf" + b"\xff" * 11, (1 << 94) - 1),
            (b"\xc0" + bytes(11), -(1 << 94)),
        ],
    )
    def test_fields_are_octal_or_base_256(self, field: bytes, value: int) -> None:
        assert numeric(field) == value

    @pytest.mark.parametrize(
        "field", [b"0000648\0", b"-000644\0", b"0x1ff\0\0\0", b"1 2\0\0\0\0\0", b"\x7f" * 8, b"+1\0"]
    )
    def test_a_field_that_is_no_number_is_refused(self, field: bytes) -> None:
        with pytest.raises(ImageError, match="should have a number"):
            numeric(field)

    @given(st.integers(-(1 << 94), (1 << 94) - 1))
    def test_base_256_is_twos_complement(self, number: int) -> None:
        field = bytearray(number.to_bytes(12, "big", signed=True))
        field[0] |= 0x80
        assert numeric(bytes(field)) == number

    def test_records_are_decimal(self) -> None:
        assert decimal(b"0") == 0
        assert decimal(b"00012") == 12
        assert decimal(b"18446744073709551616") == 1 << 64

    @pytest.mark.parametrize(
        "value", [b"", b"-1", b"+1", b" 1", b"1 ", b"1\n", b"0x1", b"1e3", b"1_0", b"\xd9\xa1", b"9" * 21]
    )
    def test_a_record_that_is_no_number_is_refused(self, value: bytes) -> None:
        with pytest.raises(ImageError, match="should have a number"):
            decimal(value)


class TestTimes:
    @pytest.mark.parametrize(
        ("value", "nanoseconds"),
        [
            (b"0", 0),
            (b"1700000000", 1_700_000_000_000_000_000),
            (b"1700000000.", 1_700_000_000_000_000_000),
            (b"1.5", 1_500_000_000),
            (b"1.000000001", 1_000_000_001),
            (b"1.0000000019", 1_000_000_001),
            (b"1.123456789123456789", 1_123_456_789),
            (b"-1", -1_000_000_000),
            (b"-1.25", -1_250_000_000),
            (b"-0.000000001", -1),
            (b"0." + b"9" * 50, 999_999_999),
        ],
    )
    def test_are_seconds_with_decimals(self, value: bytes, nanoseconds: int) -> None:
        assert timestamp(value) == nanoseconds

    @pytest.mark.parametrize("value", [b"", b".", b".5", b"1.2.3", b"1.-5", b"1,5", b"nan", b"inf", b"1e9", b"9" * 21])
    def test_anything_else_is_refused(self, value: bytes) -> None:
        with pytest.raises(ImageError, match="should have a time"):
            timestamp(value)


_KEYS = st.binary(min_size=1, max_size=200).filter(
    lambda key: not {0, 0x3D} & set(key) and not key.startswith(b"GNU.sparse.")
)


class TestRecords:
    @given(st.dictionaries(_KEYS, st.binary(max_size=2000), max_size=8))
    def test_come_back_whatever_is_in_them(self, said: dict[bytes, bytes]) -> None:
        assert records(pax_records(dict[str | bytes, str | bytes](said.items()))) == said

    @pytest.mark.parametrize(
        ("body", "found"),
        [
            (b"", {}),
            (b"6 a=b\n", {b"a": b"b"}),
            (b"5 a=\n", {b"a": b""}),
            (b"6 a=1\n6 a=2\n", {b"a": b"2"}),
            (b"8 a=b=c\n", {b"a": b"b=c"}),
            (b"8 a=\n\n\n\n", {b"a": b"\n\n\n"}),
            (b"10 a=\0b\0c\n", {b"a": b"\0b\0c"}),
            (b"007 a=\n", {b"a": b""}),
        ],
    )
    def test_the_length_decides_where_a_record_ends(self, body: bytes, found: dict[bytes, bytes]) -> None:
        assert records(body) == found

    @pytest.mark.parametrize(
        ("body", "where"),
        [
            pytest.param(b"a=b\n", 0, id="no length"),
            pytest.param(b"6a=b\n\n", 0, id="no space"),
            pytest.param(b"7 a=b\n", 0, id="longer than the header"),
            pytest.param(b"5 a=b\n", 0, id="shorter than the record"),
            pytest.param(b"6 a=bc", 0, id="no newline"),
            pytest.param(b"0 a=b\n", 0, id="length of nothing"),
            pytest.param(b"2 \n", 0, id="length of itself"),
            pytest.param(b"1 ", 0, id="length within itself"),
            pytest.param(b"-6 a=b\n", 0, id="negative length"),
            pytest.param(b"+6 a=b\n", 0, id="signed length"),
            pytest.param(b"0x6 a=b\n", 0, id="hexadecimal length"),
            pytest.param(b"9" * 7 + b" a=b\n", 0, id="length of 10 MB"),
            pytest.param(b"9" * 1000 + b" a=b\n", 0, id="length of a thousand digits"),
            pytest.param(b"18446744073709551622 a=b\n", 0, id="length that overflows 64 bits"),
            pytest.param(b"6 a=b\n" + bytes(10), 6, id="garbage behind"),
            pytest.param(b"6 a=b\n6 a=", 6, id="cut off"),
        ],
    )
    def test_a_length_that_lies_is_refused(self, body: bytes, where: int) -> None:
        with pytest.raises(ImageError, match=f"the record at byte {where} of its extended header is not as long"):
            records(body)

    @pytest.mark.parametrize("body", [b"5 =b\n", b"5 ab\n", b"8 a\0b=c\n", b"3 \n"])
    def test_what_is_no_key_and_value_is_refused(self, body: bytes) -> None:
        with pytest.raises(ImageError, match="not KEY=VALUE"):
            records(body)

    def test_the_map_of_sparse_format_0_0_comes_out_as_that_of_0_1(self) -> None:
        body = b"".join(
            pax_records({key: value})
            for key, value in [
                ("GNU.sparse.offset", "0"),
                ("GNU.sparse.numbytes", "512"),
                ("GNU.sparse.offset", "4096"),
                ("GNU.sparse.numbytes", "1"),
            ]
        )
        assert records(body) == {SPARSE_MAP: b"0,512,4096,1"}

    @pytest.mark.parametrize(
        "pairs",
        [
            [("numbytes", "1"), ("offset", "0")],
            [("offset", "0"), ("offset", "1")],
            [("offset", "0"), ("numbytes", "1"), ("numbytes", "1")],
            [("offset", "0,1")],
        ],
    )
    def test_a_map_of_0_0_that_does_not_alternate_is_refused(self, pairs: list[tuple[str, str]]) -> None:
        body = b"".join(pax_records({f"GNU.sparse.{key}": value}) for key, value in pairs)
        with pytest.raises(ImageError, match="do not alternate"):
            records(body)

    def test_only_what_can_change_a_member_counts_in_global_headers(self) -> None:
        assert all(map(is_for_all, [b"path", b"uid", b"mtime", b"SCHILY.xattr.user.a", b"LIBARCHIVE.xattr.user.a"]))
        assert not any(map(is_for_all, [b"comment", b"uname", b"atime", b"GNU.sparse.map", b"pax_global_header"]))


class TestXattrs:
    @pytest.mark.parametrize(
        ("said", "found"),
        [
            ({b"path": b"x"}, {}),
            ({b"SCHILY.xattr.user.a": b"1"}, {b"user.a": b"1"}),
            ({b"SCHILY.xattr.user.empty": b""}, {b"user.empty": b""}),
            ({b"SCHILY.xattr.security.capability": CAPABILITY}, {b"security.capability": CAPABILITY}),
            ({b"LIBARCHIVE.xattr.user.a": b"AAEC/w"}, {b"user.a": b"\0\1\2\xff"}),
            ({b"LIBARCHIVE.xattr.user.a": b"AAEC/w=="}, {b"user.a": b"\0\1\2\xff"}),
            ({b"LIBARCHIVE.xattr.user.a%3Db%25": b""}, {b"user.a=b%": b""}),
            # Archivers of the one kind write both; the verbatim one is right.
            ({b"SCHILY.xattr.user.a": b"1", b"LIBARCHIVE.xattr.user.a": b"Mg"}, {b"user.a": b"1"}),
            ({b"LIBARCHIVE.xattr.user.a": b"Mg", b"SCHILY.xattr.user.a": b"1"}, {b"user.a": b"1"}),
        ],
    )
    def test_are_read_in_both_notations(self, said: dict[bytes, bytes], found: dict[bytes, bytes]) -> None:
        assert xattrs(said) == found

    @given(st.binary(min_size=1, max_size=40), st.binary(max_size=100))
    def test_libarchives_notation_holds_any_bytes(self, name: bytes, value: bytes) -> None:
        key = b"LIBARCHIVE.xattr." + quote_from_bytes(name, safe="").encode()
        assert xattrs({key: base64.b64encode(value).rstrip(b"=")}) == {name: value}

    @pytest.mark.parametrize("value", [b"!", b"A", b"AA AA", b"A=AA", b"=", b"AAAAA", b"\xff"])
    def test_what_is_not_base64_is_refused(self, value: bytes) -> None:
        with pytest.raises(ImageError, match="should have base64"):
            xattrs({b"LIBARCHIVE.xattr.user.a": value})

    def test_as_many_as_a_file_can_have_and_no_more(self) -> None:
        assert len(xattrs({b"SCHILY.xattr.user.a": bytes(MAX_XATTR_VALUE)})[b"user.a"]) == MAX_XATTR_VALUE
        with pytest.raises(ImageError, match=r"'user\.a' has 65536 bytes, and 65535 are the most"):
            xattrs({b"SCHILY.xattr.user.a": bytes(MAX_XATTR_VALUE + 1)})
        with pytest.raises(ImageError, match="more than a file can have"):
            xattrs({b"SCHILY.xattr.user.%d" % number: b"" for number in range(8000)})
        with pytest.raises(ImageError, match="more than a file can have"):
            xattrs({b"SCHILY.xattr.user.%d" % number: bytes(60000) for number in range(5)})

    def test_no_extended_header_is_so_long_that_its_length_has_more_digits_than_are_read(self) -> None:
        assert len(str(MAX_EXTENSION)) == 7
