// A request as a line for a shell.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curlLine(path, body, needsKey) {
  const { stream_options, ...shown } = body; // only this page counts while it reads
  return [
    `curl -N ${quoted(new URL(path, document.baseURI).href)}`,
    ...(needsKey ? ['-H "Authorization: Bearer $FORETOKEN_API_KEY"'] : []),
    "-H 'Content-Type: application/json'",
    `-d ${quoted(JSON.stringify(shown, null, 2))}`,
  ].join(" \\\n  ");
}
