//! Devices and nodes of every release speak to those of every other: what is on the wire once stays what it is.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
    field_descriptor_proto::Label,
};

use crate::v1::FILE_DESCRIPTOR_SET;

/// What has ever been on the wire, a line each. Lines are added to it, and never changed or taken away.
const PROMISED: &str = include_str!("../wire.txt");

#[test]
fn what_was_ever_on_the_wire_is_still_the_same() {
    let files = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let mut spoken = BTreeSet::new();
    for file in files.file {
        for message in &file.message_type {
            of_message("", message, &mut spoken);
        }
        for of in &file.enum_type {
            of_enum("", of, &mut spoken);
        }
        for service in &file.service {
            of_service(service, &mut spoken);
        }
    }
    let promised: BTreeSet<String> = PROMISED.lines().map(str::to_owned).collect();
    let broken: Vec<&String> = promised.difference(&spoken).collect();
    assert!(
        broken.is_empty(),
        "devices in the field and older nodes still speak: {broken:#?}"
    );
    let new: Vec<&String> = spoken.difference(&promised).collect();
    assert!(new.is_empty(), "new; add to proto/wire.txt: {new:#?}");
}

fn of_message(of: &str, message: &DescriptorProto, lines: &mut BTreeSet<String>) {
    let name = format!("{of}{}", message.name());
    for field in &message.field {
        let kind = match field.type_name() {
            "" => field.r#type().as_str_name().to_owned(),
            named => named.to_owned(),
        };
        let many = match field.label() {
            Label::Repeated => "repeated ",
            Label::Optional | Label::Required => "",
        };
        lines.insert(format!(
            "{name} {} = {many}{kind} {}",
            field.number(),
            field.name()
        ));
    }
    let within = format!("{name}.");
    for nested in &message.nested_type {
        of_message(&within, nested, lines);
    }
    for nested in &message.enum_type {
        of_enum(&within, nested, lines);
    }
}

fn of_enum(of: &str, kind: &EnumDescriptorProto, lines: &mut BTreeSet<String>) {
    for value in &kind.value {
        lines.insert(format!(
            "{of}{} {} = {}",
            kind.name(),
            value.number(),
            value.name()
        ));
    }
}

fn of_service(service: &ServiceDescriptorProto, lines: &mut BTreeSet<String>) {
    for method in &service.method {
        let stream = |streams| if streams { "stream " } else { "" };
        lines.insert(format!(
            "{}/{} = {}{} to {}{}",
            service.name(),
            method.name(),
            stream(method.client_streaming()),
            method.input_type(),
            stream(method.server_streaming()),
            method.output_type(),
        ));
    }
}
