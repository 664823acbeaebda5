// Checks docs/mqtt/asyncapi.yaml and the schemas that it refers to, with the parser of the AsyncAPI project (`make asyncapi`).
import { createRequire } from "node:module";

const require = createRequire(process.cwd() + "/.deps/asyncapi/");
const { Parser, fromFile } = require("@asyncapi/parser");
const { document, diagnostics } = await fromFile(new Parser(), "docs/mqtt/asyncapi.yaml").parse();
for (const { severity, path, message } of diagnostics) {
  console.log(["error", "warning", "info", "hint"][severity], path.join("."), message);
}
if (!document) process.exit(1);
console.log(`asyncapi: ${document.channels().all().length} channels, ${document.operations().all().length} operations`);
