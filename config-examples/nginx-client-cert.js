// The certificate that the client has shown, in the form of RFC 9440: its DER in base64, between colons. PEM is the same
// base64 between other marks, on several lines.
function header(r) {
    const pem = r.variables.ssl_client_raw_cert;
    if (!pem) {
        return '';
    }
    return ':' + pem.replace(/-----(BEGIN|END) CERTIFICATE-----/g, '').replace(/\s/g, '') + ':';
}

export default { header };
