"""Replace e-mail addresses and public IP addresses by fixed placeholders."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

EMAIL_PLACEHOLDER, IP_PLACEHOLDER = "<email>", "<ip-address>"
# The local part begins where nothing of its kind stands before it, so that a long run is looked at once.
EMAIL = re.compile(
    r"(?<![\w.!#$%&'*+/=?^`{|}~-])[A-Za-z0-9_.!#$%&'*+/=?^`{|}~-]{1,64}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
)
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\w)")
# Public addresses lie in 2000::/3 (RFC 4291, section 2.4), so they begin with 2 or 3
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?![\w:])")


def scrub(text: str) -> tuple[str, Counter[str]]:
    """Return the text with placeholders, and how many e-mail and IP addresses were replaced.

    Addresses of private, loopback and documentation networks stay.
    """
    counts: Counter[str] = Counter()

    def replace_email(_: re.Match[str]) -> str:
        counts["email"] += 1
        return EMAIL_PLACEHOLDER

    def replace_ip(match: re.Match[str]) -> str:
        address, end = match[0], ""
        if address.endswith(":") and not address.endswith("::"):  # the colon of the sentence
            address, end = address[:-1], ":"
        if not _is_public(address):
            return match[0]
        counts["ip_address"] += 1
        return IP_PLACEHOLDER + end

    if "@" in text:
        text = EMAIL.sub(replace_email, text)
    text = IPV4.sub(replace_ip, text)
    if ":" in text:
        text = IPV6.sub(replace_ip, text)
    return text, counts


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
