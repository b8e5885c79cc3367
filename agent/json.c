// SPDX-License-Identifier: Apache-2.0
/*
 * Parser of flat JSON: one object of strings and numbers, parsed in place. No nesting, true, null.
 *
 * No packaged library can replace it. Debian's libcjson-dev has only a shared library, which OSv
 * images would have to include. jsmn.h of libjsmn-dev splits text into tokens but checks no
 * grammar, even with JSMN_STRICT: it accepts `{"op":"hello" "x":1}`, `{"op":"hello",}` and
 * `{"op":nan}`. So the checks, the unescaping and the lookup of keys would still be needed here.
 */
#include <stdlib.h>
#include <string.h>

#include "agent.h"

static char *skip_space(char *at)
{
	return at + strspn(at, " \t\r\n");
}

/* `at` is the opening quote. Terminates the text in place; returns what follows, or NULL. */
static char *parse_text(char *at, const char **text)
{
	char *to = ++at;

	*text = to;
	for (; *at != '"'; at++) {
		if ((unsigned char)*at < ' ')
			return NULL;
		if (*at != '\\')
			*to++ = *at;
		else if (*++at == '"' || *at == '\\' || *at == '/')
			*to++ = *at;
		else
			return NULL;
	}
	*to = 0;
	return at + 1;
}

static char *parse_value(char *at, struct member *m)
{
	size_t length = strspn(at, "+-.0123456789eE");
	char *end;

	if (*at == '"')
		return parse_text(at, &m->text);
	m->text = NULL;
	m->number = strtod(at, &end);
	return length && end == at + length ? end : NULL;
}

static struct member *find(struct json *j, const char *key)
{
	for (unsigned i = 0; i < j->count; i++)
		if (!strcmp(j->member[i].key, key))
			return &j->member[i];
	return NULL;
}

bool json_parse(struct json *j, char *line)
{
	char *at = skip_space(line);

	*j = (struct json){.fault = "not a flat JSON object of strings and numbers"};
	if (*at++ != '{')
		return false;
	at = skip_space(at);
	while (*at != '}') {
		struct member m = {0};

		if (*at != '"' || !(at = parse_text(at, &m.key)))
			return false;
		at = skip_space(at);
		if (*at++ != ':' || !(at = parse_value(skip_space(at), &m)))
			return false;
		if (find(j, m.key)) {
			j->fault = "a key stands twice";
			return false;
		}
		if (j->count == sizeof(j->member) / sizeof(*j->member)) {
			j->fault = "too many keys";
			return false;
		}
		j->member[j->count++] = m;
		at = skip_space(at);
		if (*at == ',') {
			at = skip_space(at + 1);
			if (*at != '"')
				return false;
		} else if (*at != '}') {
			return false;
		}
	}
	return !*skip_space(at + 1);
}

const char *json_text(struct json *j, const char *key)
{
	struct member *m = find(j, key);

	if (!m || !m->text)
		return NULL;
	m->used = true;
	return m->text;
}

const struct member *json_number(struct json *j, const char *key)
{
	struct member *m = find(j, key);

	if (!m || m->text)
		return NULL;
	m->used = true;
	return m;
}

const char *json_unused(const struct json *j)
{
	for (unsigned i = 0; i < j->count; i++)
		if (!j->member[i].used)
			return j->member[i].key;
	return NULL;
}

void json_quote(FILE *out, const char *text)
{
	fputc('"', out);
	for (; *text; text++) {
		if ((unsigned char)*text < ' ')
			fprintf(out, "\\u%04x", *text);
		else if (*text == '"' || *text == '\\')
			fprintf(out, "\\%c", *text);
		else
			fputc(*text, out);
	}
	fputc('"', out);
}

void print_fault(FILE *out, const char *fault)
{
	fprintf(out, "{\"ok\":false,\"error\":");
	json_quote(out, fault);
	fprintf(out, "}\n");
}
