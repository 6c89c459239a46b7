package config

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/headcni/headcni/pkg/config/secret"
)

// field is one leaf of a Config.
type field struct{ v reflect.Value }

// walk calls fn for each leaf of c until fn returns false.
func walk(c *Config, fn func(key string, f field) bool) {
	walkStruct("", reflect.ValueOf(c).Elem(), fn)
}

func walkStruct(prefix string, v reflect.Value, fn func(string, field) bool) bool {
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
		key := prefix + name
		f := v.Field(i)
		if _, leaf := f.Interface().(secret.Secret); f.Kind() == reflect.Struct && !leaf {
			if !walkStruct(key+".", f, fn) {
				return false
			}
			continue
		}
		if !fn(key, field{f}) {
			return false
		}
	}
	return true
}

// set parses value into the leaf. Its errors do not repeat the value, which may be secret.
func (f field) set(value string) error {
	if _, ok := f.v.Interface().(secret.Secret); ok {
		f.v.Set(reflect.ValueOf(secret.New(value)))
		return nil
	}
	switch f.v.Kind() {
	case reflect.String:
		f.v.SetString(value)
	case reflect.Bool:
		b, err := strconv.ParseBool(value)
		if err != nil {
			return fmt.Errorf("want true or false")
		}
		f.v.SetBool(b)
	case reflect.Int:
		n, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("want a whole number")
		}
		f.v.SetInt(int64(n))
	case reflect.Slice:
		if f.v.Type().Elem().Kind() != reflect.String {
			return fmt.Errorf("cannot be set like this; write it into the file")
		}
		list := reflect.MakeSlice(f.v.Type(), 0, 4)
		for s := range strings.SplitSeq(value, ",") {
			if s = strings.TrimSpace(s); s != "" {
				list = reflect.Append(list, reflect.ValueOf(s))
			}
		}
		f.v.Set(list)
	default:
		return fmt.Errorf("cannot be set like this; write it into the file")
	}
	return nil
}
