//! What a certificate says of whom it was made out to. Whether that is true has been checked before anybody asks here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::SystemTime;

use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// The subject's common name; the last one, as in Go, if there are several.
pub(crate) fn common_name(der: &[u8]) -> Option<String> {
    let certificate = Certificate::from_der(der).ok()?;
    let attributes = certificate.tbs_certificate.subject.0.iter().flat_map(|part| part.0.iter());
    let names = attributes.filter(|attribute| attribute.oid == COMMON_NAME).map(|attribute| &attribute.value);
    let texts = names.filter(|value| matches!(value.tag(), Tag::Utf8String | Tag::PrintableString | Tag::Ia5String | Tag::TeletexString));
    texts.filter_map(|value| std::str::from_utf8(value.value()).ok()).next_back().map(str::to_owned)
}

/// The hosts that a certificate is made out to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Hosts {
    pub names: Vec<String>,
    pub addresses: Vec<IpAddr>,
}

/// Its subject alternative names; none if the certificate cannot be read.
pub(super) fn hosts(der: &[u8]) -> Option<Hosts> {
    let certificate = Certificate::from_der(der).ok()?;
    let mut hosts = Hosts::default();
    let Some((_, names)) = certificate.tbs_certificate.get::<SubjectAltName>().ok()? else { return Some(hosts) };
    for name in names.0 {
        match name {
            GeneralName::DnsName(name) => hosts.names.push(name.as_str().to_owned()),
            GeneralName::IpAddress(bytes) => {
                let v4 = <[u8; 4]>::try_from(bytes.as_bytes()).map(|bytes| IpAddr::from(Ipv4Addr::from(bytes)));
                let v6 = || <[u8; 16]>::try_from(bytes.as_bytes()).map(|bytes| IpAddr::from(Ipv6Addr::from(bytes)));
                hosts.addresses.extend(v4.or_else(|_| v6()).ok());
            }
            _ => {}
        }
    }
    Some(hosts)
}

/// From when until when it is good.
pub(super) fn validity(der: &[u8]) -> Option<(SystemTime, SystemTime)> {
    let validity = Certificate::from_der(der).ok()?.tbs_certificate.validity;
    Some((validity.not_before.to_system_time(), validity.not_after.to_system_time()))
}
