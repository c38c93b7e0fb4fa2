/*
 * A PKCS#11 module for tests: passes every call on to a real module and, where a rule says so, delays it, fails it
 * or lets it hang, as a sick token does. It stands in for no token: whatever it does not spoil, the real module does.
 *
 * The rules are the file beside it, "<this library>.rules", read at each call, one a line; the first that fits counts:
 *
 *     module PATH                      the real module; read once, when it is loaded
 *     FUNCTION fail CODE [LABEL]       returns CODE (hexadecimal) without calling the real module, but for C_Encrypt and
 *                                      C_Decrypt: whatever they say ends the operation that the session has begun
 *     FUNCTION once CODE [LABEL]       the same, of the first call since the rules were written
 *     FUNCTION delay MILLISECONDS [LABEL]
 *     FUNCTION hang - [LABEL]          until the rule is gone
 *     FUNCTION log - [LABEL]           a line more in "<this library>.calls": process, FUNCTION, first argument
 *     C_GenerateKey value HEX [LABEL]  the AES key that it makes has these 32 bytes
 *     FUNCTION shows TYPE=BYTE [LABEL] C_GetAttributeValue says of what it makes that the flag TYPE is BYTE (hexadecimal),
 *                                      for as long as the object is there; FUNCTION is one that makes a key
 *
 * With LABEL a rule is for the token of that label alone. Loaded twice, from two files, it is two modules.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long word; /* CK_ULONG, and wide enough for every argument */
typedef word (*function)(word, word, word, word, word, word, word, word);

struct function_list {
  unsigned char major, minor;
  function call[68];
};

struct attribute {
  word type;
  void *value;
  word length;
};

enum { CKR_OK = 0, CKR_GENERAL_ERROR = 5, CKA_VALUE = 0x11, CKA_VALUE_LEN = 0x161, KEY_BYTES = 32, MOST_MADE = 4096 };

/* PKCS#11 2.40, CK_FUNCTION_LIST: the order is the standard's. What the first argument is stands behind each name. */
#define SESSION 's'
#define SLOT 't'
#define NEITHER '-'
#define EACH(X)                                                                                                      \
  X(0, C_Initialize, NEITHER) X(1, C_Finalize, NEITHER) X(2, C_GetInfo, NEITHER) X(4, C_GetSlotList, NEITHER)         \
  X(5, C_GetSlotInfo, SLOT) X(6, C_GetTokenInfo, SLOT) X(7, C_GetMechanismList, SLOT)                                 \
  X(8, C_GetMechanismInfo, SLOT) X(9, C_InitToken, SLOT) X(10, C_InitPIN, SESSION) X(11, C_SetPIN, SESSION)           \
  X(12, C_OpenSession, SLOT) X(13, C_CloseSession, SESSION) X(14, C_CloseAllSessions, SLOT)                           \
  X(15, C_GetSessionInfo, SESSION) X(18, C_Login, SESSION) X(19, C_Logout, SESSION) X(20, C_CreateObject, SESSION)    \
  X(21, C_CopyObject, SESSION) X(22, C_DestroyObject, SESSION) X(24, C_GetAttributeValue, SESSION)                    \
  X(25, C_SetAttributeValue, SESSION) X(26, C_FindObjectsInit, SESSION) X(27, C_FindObjects, SESSION)                 \
  X(28, C_FindObjectsFinal, SESSION) X(29, C_EncryptInit, SESSION) X(30, C_Encrypt, SESSION)                          \
  X(33, C_DecryptInit, SESSION) X(34, C_Decrypt, SESSION) X(58, C_GenerateKey, SESSION)                               \
  X(59, C_GenerateKeyPair, SESSION) X(60, C_WrapKey, SESSION) X(61, C_UnwrapKey, SESSION)                             \
  X(64, C_GenerateRandom, SESSION)

static struct function_list *real;
static struct function_list ours;
static char rules[4096], calls[4096];

static int label_is(char kind, word first, const char *label) {
  word session[8] = {0}; /* CK_SESSION_INFO begins with the slot */
  unsigned char token[1024] = {0}; /* CK_TOKEN_INFO begins with the label: 32 bytes, padded with blanks */
  char padded[33];
  if (kind == SESSION) {
    if (real->call[15](first, (word)session, 0, 0, 0, 0, 0, 0) != CKR_OK) return 0;
    first = session[0];
  } else if (kind != SLOT) {
    return 0;
  }
  if (real->call[6](first, (word)token, 0, 0, 0, 0, 0, 0) != CKR_OK) return 0;
  snprintf(padded, sizeof padded, "%-32.32s", label);
  return memcmp(token, padded, 32) == 0;
}

/* Finds the rule for a call: its verb and its argument. */
static int rule_for(const char *name, char kind, word first, char verb[16], char argument[128]) {
  char line[512], function_name[64], label[64];
  int found = 0;
  FILE *file = fopen(rules, "re");
  if (file == NULL) return 0;
  while (!found && fgets(line, sizeof line, file) != NULL) {
    int fields = sscanf(line, "%63s %15s %127s %63s", function_name, verb, argument, label);
    if (fields < 3 || strcmp(function_name, name) != 0) continue;
    found = fields == 3 || label_is(kind, first, label);
  }
  fclose(file);
  return found;
}

/* A line this short is written whole, whichever thread or process writes beside it. */
static void note(const char *name, word first) {
  FILE *file = fopen(calls, "ae");
  if (file == NULL) return;
  fprintf(file, "%ld %s %lu\n", (long)getpid(), name, first);
  fclose(file);
}

static void pause_ms(long milliseconds) {
  struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
  nanosleep(&time, NULL);
}

/* C_GenerateKey(session, mechanism, template, count, key) as C_CreateObject of the bytes that the rule gives. */
static word key_of(const char *hex, word session, const struct attribute *template, word count, word key) {
  struct attribute given[64];
  unsigned char value[KEY_BYTES];
  word number = 0;
  if (strlen(hex) != 2 * KEY_BYTES || count + 1 > 64) return CKR_GENERAL_ERROR;
  for (int at = 0; at < KEY_BYTES; at++) {
    unsigned int byte;
    if (sscanf(hex + 2 * at, "%2x", &byte) != 1) return CKR_GENERAL_ERROR;
    value[at] = (unsigned char)byte;
  }
  for (word at = 0; at < count; at++) {
    if (template[at].type != CKA_VALUE_LEN) given[number++] = template[at];
  }
  given[number++] = (struct attribute){CKA_VALUE, value, KEY_BYTES};
  return real->call[20](session, (word)given, number, key, 0, 0, 0, 0);
}

/* Objects that are shown with another flag than they have. No handle is used twice: SoftHSM only counts up. */
static struct {
  word object, type;
  unsigned char value;
} made[MOST_MADE];
static int made_number;
static pthread_mutex_t made_lock = PTHREAD_MUTEX_INITIALIZER;

/* Where a function writes the handle of the key that it makes; of a key pair, the private one's. */
static const word *place_of_key(int index, word e, word h) {
  switch (index) {
    case 21: /* C_CopyObject */
    case 58: /* C_GenerateKey */
      return (const word *)e;
    case 59: /* C_GenerateKeyPair */
    case 61: /* C_UnwrapKey */
      return (const word *)h;
    default:
      return NULL;
  }
}

static word make_to_show(const char *rule, int index, word a, word b, word c, word d, word e, word f, word g, word h) {
  word type;
  unsigned int value;
  const word *key = place_of_key(index, e, h);
  if (key == NULL || sscanf(rule, "%lx=%2x", &type, &value) != 2) return CKR_GENERAL_ERROR;
  word result = real->call[index](a, b, c, d, e, f, g, h);
  if (result != CKR_OK) return result;
  pthread_mutex_lock(&made_lock);
  if (made_number < MOST_MADE) {
    made[made_number].object = *key;
    made[made_number].type = type;
    made[made_number++].value = (unsigned char)value;
  } else {
    result = CKR_GENERAL_ERROR;
  }
  pthread_mutex_unlock(&made_lock);
  return result;
}

/* After C_GetAttributeValue(session, object, template, count). */
static void show(word object, const struct attribute *template, word count) {
  pthread_mutex_lock(&made_lock);
  for (int at = 0; at < made_number; at++) {
    if (made[at].object != object) continue;
    for (word each = 0; each < count; each++) {
      if (template[each].type != made[at].type || template[each].value == NULL || template[each].length != 1) continue;
      *(unsigned char *)template[each].value = made[at].value;
    }
  }
  pthread_mutex_unlock(&made_lock);
}

/* Whether this is the first call of the function since the rules were written. */
static int is_first(int index) {
  static struct stat seen[68];
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  struct stat file;
  if (stat(rules, &file) != 0) return 0;
  pthread_mutex_lock(&lock);
  /* Rules are renamed into place; the clock of files is coarse. */
  int first = seen[index].st_ino != file.st_ino || seen[index].st_mtim.tv_sec != file.st_mtim.tv_sec ||
              seen[index].st_mtim.tv_nsec != file.st_mtim.tv_nsec;
  seen[index] = file;
  pthread_mutex_unlock(&lock);
  return first;
}

static word pass(int index, const char *name, char kind, word a, word b, word c, word d, word e, word f, word g,
                 word h) {
  char verb[16], argument[128];
  while (rule_for(name, kind, a, verb, argument)) {
    if (strcmp(verb, "hang") == 0) {
      pause_ms(10);
      continue;
    }
    if (strcmp(verb, "fail") == 0 || (strcmp(verb, "once") == 0 && is_first(index))) {
      /* PKCS#11 2.40, 5.8.2 and 5.9.2: one-part calls that fail end the operation. */
      if (index == 30 || index == 34) real->call[index](a, b, c, d, e, f, g, h);
      return strtoul(argument, NULL, 16);
    }
    if (strcmp(verb, "delay") == 0) pause_ms(strtol(argument, NULL, 10));
    if (strcmp(verb, "log") == 0) note(name, a);
    if (strcmp(verb, "value") == 0) return key_of(argument, a, (const struct attribute *)c, d, e);
    if (strcmp(verb, "shows") == 0) return make_to_show(argument, index, a, b, c, d, e, f, g, h);
    break;
  }
  word result = real->call[index](a, b, c, d, e, f, g, h);
  if (index == 24) show(b, (const struct attribute *)c, d);
  return result;
}

#define DEFINE(index, name, kind)                                                                                    \
  static word shim_##name(word a, word b, word c, word d, word e, word f, word g, word h) {                          \
    return pass(index, #name, kind, a, b, c, d, e, f, g, h);                                                         \
  }
EACH(DEFINE)

static word load(void) {
  char path[4096] = "/usr/lib/softhsm/libsofthsm2.so", line[4200];
  Dl_info self;
  if (dladdr((void *)load, &self) == 0) return CKR_GENERAL_ERROR;
  snprintf(rules, sizeof rules, "%s.rules", self.dli_fname);
  snprintf(calls, sizeof calls, "%s.calls", self.dli_fname);
  FILE *file = fopen(rules, "re");
  while (file != NULL && fgets(line, sizeof line, file) != NULL) {
    if (sscanf(line, "module %4095s", path) == 1) break;
  }
  if (file != NULL) fclose(file);
  void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (module == NULL) {
    fprintf(stderr, "pkcs11_shim: %s\n", dlerror());
    return CKR_GENERAL_ERROR;
  }
  word (*get)(struct function_list **) = (word(*)(struct function_list **))dlsym(module, "C_GetFunctionList");
  if (get == NULL || get(&real) != CKR_OK) return CKR_GENERAL_ERROR;
  ours = *real;
#define FILL(index, name, kind) ours.call[index] = shim_##name;
  EACH(FILL)
  return CKR_OK;
}

static word loaded;
static void load_once(void) { loaded = load(); }

word C_GetFunctionList(struct function_list **list) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, load_once);
  if (loaded == CKR_OK) *list = &ours;
  return loaded;
}
